"""Answer a question about images or a video."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

import mmfast
from mmfast.cli import common


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
        if not text.endswith("�") and text.startswith(self._written):
            sys.stdout.write(text[len(self._written) :])
            sys.stdout.flush()
            self._written = text

    def end(self) -> None:
        """End the line."""
        sys.stdout.write("\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("media", nargs="+", metavar="MEDIA", help="images, or one video")
    parser.add_argument("question", metavar="QUESTION", help="the question")
    parser.add_argument("--plan", default="full", help='for example "divprune(keep=64)"; default: the full model')
    common.add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Answer, then report."""
    common.quiet_libraries()
    plan = mmfast.Plan.of(options.plan)
    media = common.read_media(options.media, options.frames)
    common.notes(options, media)
    with common.working("loading the model"):
        model, processor = common.load_model(options)
    inputs = common.build_inputs(processor, model, options.question, media)
    streamer = None if options.json else _Stream(processor)
    with mmfast.accelerate(model, plan) as fast, torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer)
    report = fast.report()
    answer = common.answer_text(processor, output[0, inputs["input_ids"].shape[1] :])
    if options.json:
        common.write_json({"question": options.question, "answer": answer, "report": report.to_dict()})
    else:
        sys.stdout.write(f"\n{report}\n")
    return 0
