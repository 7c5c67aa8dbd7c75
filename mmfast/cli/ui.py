"""Open a page on this machine on which two plans answer side by side."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from mmfast.cli import common

PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    common.add_model_arguments(parser)
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"port on 127.0.0.1 (default {PORT}; 0 takes a free one)"
    )


def run(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from mmfast.ui.app import import_gradio, serving
    from mmfast.ui.session import Session

    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port={options.port} must be 0 to 65535")
    # Said before a model is loaded for nothing.
    import_gradio()
    device = common.device_of(options.device)
    common.quiet_libraries()
    with common.working("loading the model"):
        model, processor = common.load_model(options, device)
    name = type(model).__name__
    title = f"{options.model} ({name})" if options.model else f"{name}, {common.DEMO}"
    # Uploads are removed on the way out, also where a service manager ends the process.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(Session(model, processor), title=title, port=options.port) as address:
            if options.json:
                common.write_json({"url": address})
                sys.stdout.flush()
            else:
                sys.stderr.write(f"open {address} in a browser; Ctrl-C ends it\n")
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)
