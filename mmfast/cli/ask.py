"""Answer a question about images or a video."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import mmfast
from mmfast.cli import common

if TYPE_CHECKING:
    import torch


class _Stream:
    """Write an answer as it is generated."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokens: list[int] = []
        self._written = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (once), then each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens.extend(value.flatten().tolist())
        text = self._processor.decode(self._tokens, skip_special_tokens=True).lstrip()
        # A token may complete a character that was written as a replacement sign: wait for it.
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(self._written):
            sys.stdout.write(common.printable(text[len(self._written) :]))
            sys.stdout.flush()
            self._written = text

    def end(self) -> None:
        """End the line."""
        sys.stdout.write("\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    common.add_question_arguments(parser)
    parser.add_argument("--plan", default="full", help='for example "divprune(keep=64)"; default: the full model')


def run(options: argparse.Namespace) -> None:
    """Answer, then report."""
    common.check_numbers(options, "frames", "max_new_tokens")
    plan = mmfast.Plan.of(options.plan)
    device = common.device_of(options.device)
    common.quiet_libraries()
    with common.working("reading"):
        media = common.read_media(options.media, options.frames)
    common.notes(options, media)
    with common.working("loading the model"):
        model, processor = common.load_model(options, device)
        inputs = common.build_inputs(processor, model, options.question, media)
    streamer = None if options.json else _Stream(processor)
    with mmfast.accelerate(model, plan) as fast:
        output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer)
    report = fast.report()
    if options.json:
        answer = common.answer_text(processor, output[0, inputs["input_ids"].shape[1] :])
        common.write_json({"question": options.question, "answer": answer, "report": report.to_dict()})
    else:
        sys.stdout.write(f"\n{report}\n")
