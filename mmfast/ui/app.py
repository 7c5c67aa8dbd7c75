"""The page in a browser: a thin layer of gradio over a session, on the loopback address alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from mmfast.ui.session import LONGEST_QUESTION, MOST_FRAMES, MOST_NEW_TOKENS, Pane, Session

PLANS = (
    "full",
    "divprune(keep=64)",
    "divprune(keep=128) + pyramiddrop()",
    "fastv(layer=2, keep=0.5)",
    "pool2d(keep=64)",
    "random(keep=64)",
)
"""Offered to choose from; any other can be typed."""

_HOST = "127.0.0.1"
_UPLOAD = 512 * 2**20
# Seconds: uploads are looked at every ten minutes and kept for an hour.
_KEPT = (600, 3600)
_STYLE = """
.mmfast .rest { fill: var(--border-color-primary); } .mmfast .enter { fill: #c98500; fill-opacity: .45; }
.mmfast .bar { fill: #c98500; } .mmfast .time { width: 100%; height: 4.5rem; display: block; }
.mmfast .soft { font-size: .85em; opacity: .75; } .mmfast .failed { color: #c22a52; }
.mmfast table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 .8rem; }
.mmfast :is(table, tbody, tr, td) { border: 0 solid var(--border-color-primary) !important; }
.kept .grid-wrap { min-height: 0 !important; max-height: none !important; }
.mmfast td { padding: .2rem 0; border-bottom-width: 1px !important; } .mmfast td + td { text-align: right; }
.dark .mmfast .failed { color: #ff6b8f; }
"""


def build(session: Session, *, title: str) -> Any:
    """Lay out the page.

    Args:
        session: who answers.
        title: what the page says of the model.

    Returns:
        ``gradio.Blocks``, not yet served.

    Raises:
        ImportError: without gradio.
    """
    gradio = import_gradio()
    with gradio.Blocks(title="mmfast", analytics_enabled=False, delete_cache=_KEPT, fill_width=True) as blocks:
        gradio.HTML(f'<div class="mmfast"><h2>mmfast</h2><p class="soft">{escape(title)}</p></div>')
        with gradio.Row():
            files = gradio.File(label="images, or one video", file_count="multiple", elem_id="media", scale=2)
            with gradio.Column(scale=3):
                question = gradio.Textbox(label="question", max_length=LONGEST_QUESTION, elem_id="question")
                with gradio.Row():
                    frames = gradio.Slider(1, MOST_FRAMES, value=8, step=1, label="frames of a video")
                    most = gradio.Slider(1, MOST_NEW_TOKENS, value=32, step=1, label="tokens of an answer")
                with gradio.Row():
                    button = gradio.Button("ask", variant="primary", elem_id="ask")
                    stop = gradio.Button("stop")
        plans, shown = [], []
        with gradio.Row():
            for place, plan in enumerate(PLANS[:2]):
                with gradio.Column(min_width=280):
                    plans.append(
                        gradio.Dropdown(
                            list(PLANS), value=plan, allow_custom_value=True, label="plan", elem_id=f"plan-{place}"
                        )
                    )
                    # Plain text: an answer is whatever a model wrote.
                    shown.append(gradio.Textbox(label="answer", lines=2, elem_id=f"answer-{place}", interactive=False))
                    shown.append(gradio.HTML(elem_id=f"figures-{place}"))
                    shown.append(
                        gradio.Gallery(
                            label="kept patches",
                            columns=4,
                            elem_classes="kept",
                            object_fit="contain",
                            format="jpeg",
                            buttons=["fullscreen"],
                        )
                    )

        def answer(
            paths: list[str] | None, words: str, left: str, right: str, count: int, tokens: int
        ) -> Iterator[list[Any]]:
            asked = session.ask(
                paths or [], words or "", [left or "", right or ""], frames=int(count), max_new_tokens=int(tokens)
            )
            for panes in asked:
                yield [value for pane in panes for value in _values(pane)]

        inputs = [files, question, *plans, frames, most]
        # Several may wait; the session lets one at a time at the model.
        settings: dict[str, Any] = {"inputs": inputs, "outputs": shown, "concurrency_limit": 4}
        runs = [
            button.click(answer, **settings, api_visibility="private"),
            question.submit(answer, **settings, api_visibility="private"),
        ]
        stop.click(None, cancels=runs)
    return blocks


@contextmanager
def serving(session: Session, *, title: str, port: int) -> Iterator[str]:
    """Serve the page on this machine, and on it alone, until the context ends.

    Meanwhile the temporary files of this process lie in a folder of their own, which is removed with all uploads.

    Args:
        session: who answers.
        title: what the page says of the model.
        port: 0 takes any that is free.

    Yields:
        The address.

    Raises:
        ImportError: without gradio.
        OSError: if the port is taken.
    """
    gradio = import_gradio()
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="mmfast-ui-", ignore_cleanup_errors=True) as folder:
        # There is no other way to tell gradio where uploads shall lie, but for a variable of the environment.
        tempfile.tempdir = folder
        blocks = None
        try:
            blocks = build(session, title=title)
            yield _launch(gradio, blocks, port)
        finally:
            if blocks is not None:
                blocks.close(verbose=False)
            tempfile.tempdir = before


def _launch(gradio: Any, blocks: Any, port: int) -> str:
    # The fonts of gradio's other themes would be fetched from elsewhere.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = blocks.launch(
        server_name=_HOST,
        server_port=port or None,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=_UPLOAD,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        theme=theme,
        css=_STYLE,
    )
    return str(address)


def _values(pane: Pane) -> tuple[str, str, list[tuple[Any, str]]]:
    """Turn a pane into the values of its three components."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pane.figures)
    note = f'<p class="{"failed" if pane.failed else "soft"}">{escape(pane.note)}</p>' if pane.note else ""
    table = f"<table>{rows}</table>" if rows else ""
    pictures = [(drawing.image, drawing.caption) for drawing in pane.drawings]
    return pane.answer, f'<div class="mmfast">{note}{table}{pane.time_line}</div>', pictures


def import_gradio() -> Any:
    """Return gradio.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the page needs gradio: pip install 'mmfast[serve]' ({error})") from error
    return gradio
