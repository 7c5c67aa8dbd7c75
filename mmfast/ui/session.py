"""Questions about uploaded media, answered under several plans, piece by piece; without any browser."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mmfast
from mmfast.cli.common import Media, answer_text, build_inputs, one_line, printable, read_media
from mmfast.cli.drawings import Drawing, drawings, shown_frames
from mmfast.cli.patches import time_line
from mmfast.plan import Plan
from mmfast.report import Report

LONGEST_QUESTION = 4000
MOST_FRAMES = 64
MOST_NEW_TOKENS = 512
_LONGEST_PLAN = 1000


@dataclass(frozen=True)
class Pane:
    """What is to be seen of one plan.

    Attributes:
        answer: the answer so far; plain text.
        note: one line on what goes on, or why there is no answer.
        failed: the note is an error.
        figures: quantities of the report by name, once the answer is complete.
        drawings: the media with dropped patches dimmed.
        time_line: the tokens kept of each frame as HTML; empty without a video.
    """

    answer: str = ""
    note: str = ""
    failed: bool = False
    figures: tuple[tuple[str, str], ...] = ()
    drawings: tuple[Drawing, ...] = ()
    time_line: str = ""


class Session:
    """One model and whoever asks it; its calls take turns, for a plan changes the model while it is at work.

    Args:
        model: an unmodified vision-language model.
        processor: its processor.

    Example:
        >>> from mmfast.media import sample
        >>> session = Session(*mmfast.load_default())
        >>> steps = list(session.ask([sample("coffee.jpg")], "what color is it?", ["full", "uniform(keep=16)"]))
        >>> [dict(pane.figures)["visual tokens into the LLM"] for pane in steps[-1]]
        ['256 of 256', '16 of 256']
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self._lock = threading.Lock()

    def ask(
        self, paths: Sequence[Any], question: str, plans: Sequence[str], *, frames: int = 8, max_new_tokens: int = 64
    ) -> Iterator[tuple[Pane, ...]]:
        """Answer a question under each plan in turn.

        Args:
            paths: files of images, and at most one video.
            question: what is asked.
            plans: plans as text; paths of plan files are not taken, for whoever asks may sit elsewhere.
            frames: frames taken from a video.
            max_new_tokens: tokens an answer may have.

        Yields:
            One pane per plan, as often as something changes. What cannot be used is said in the panes, on one line.
        """
        panes = [Pane(note="waiting") for _ in plans]
        try:
            _check(paths, question, frames, max_new_tokens)
            media = read_media([str(path) for path in paths], frames)
            inputs = build_inputs(self.processor, self.model, question, media)
        except (OSError, TypeError, ValueError, ImportError) as error:
            failure = _failure(error)
            for path in map(Path, paths):
                # Where an upload is kept says nothing to whoever chose it.
                failure = replace(failure, note=failure.note.replace(str(path), path.name))
            yield (failure,) * len(plans)
            return
        for place, text in enumerate(plans):
            for pane in self._answers(text, inputs, media, max_new_tokens):
                panes[place] = pane
                yield tuple(panes)

    def _answers(self, text: str, inputs: Any, media: Media, max_new_tokens: int) -> Iterator[Pane]:
        """Answer under one plan; the model is worked in a thread of its own, so that pieces come as they are made."""
        try:
            if len(text) > _LONGEST_PLAN:
                raise ValueError(f"a plan may have {_LONGEST_PLAN} characters, got {len(text)}")
            plan = Plan.parse(text)
        except (TypeError, ValueError) as error:
            yield _failure(error)
            return
        call = _Call(self, plan, inputs, max_new_tokens)
        thread = threading.Thread(target=call.run, daemon=True)
        pane = Pane(note="waiting for its turn" if self._lock.locked() else "running")
        thread.start()
        try:
            yield pane
            while isinstance(piece := call.pieces.get(), str):
                pane = replace(pane, answer=printable(piece), note="running")
                yield pane
        finally:
            # Whoever listened may have gone: the model is not kept at work for nobody.
            call.stopped.set()
            thread.join()
        if isinstance(piece, BaseException):
            yield replace(_failure(piece), answer=pane.answer)
        else:
            yield self._complete(pane, piece, media)

    def _complete(self, pane: Pane, report: Report, media: Media) -> Pane:
        drawn, note = drawings(report, media, self.processor)
        warnings = [one_line(line) for line in media.warnings]
        return replace(
            pane,
            note=" ".join(filter(None, [*warnings, note])),
            figures=tuple(figures(report)),
            drawings=tuple(drawn),
            time_line=time_line(shown_frames(report, media) or []),
        )


class _Gone(Exception):
    """Nobody waits for the answer any more."""


class _Call:
    """One call of ``generate``, and the streamer it feeds.

    What was written so far is put into :attr:`pieces` after each token, and at the end the report or an exception.
    """

    def __init__(self, session: Session, plan: Plan, inputs: Any, max_new_tokens: int) -> None:
        self.pieces: queue.SimpleQueue[str | Report | BaseException] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self._session, self._plan, self._inputs, self._most = session, plan, inputs, max_new_tokens
        self._tokens: list[int] = []
        self._prompt_seen = False

    def run(self) -> None:
        """Generate, when it is this call's turn."""
        session = self._session
        try:
            with session._lock:
                self._raise_if_stopped()
                with mmfast.accelerate(session.model, self._plan) as fast:
                    output = session.model.generate(
                        **self._inputs, max_new_tokens=self._most, do_sample=False, streamer=self
                    )
                report = fast.report()
            new = output[0, self._inputs["input_ids"].shape[1] :]
            self.pieces.put(answer_text(session.processor, new))
            self.pieces.put(report)
        except Exception as error:
            self.pieces.put(error)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (once), then each token."""
        self._raise_if_stopped()
        if self._prompt_seen:
            self._tokens.extend(value.flatten().tolist())
            text = answer_text(self._session.processor, torch.tensor(self._tokens))
            # A token may complete a character that would be shown as a replacement sign.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self.pieces.put(text)
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: what ends the answer is its report."""

    def _raise_if_stopped(self) -> None:
        if self.stopped.is_set():
            raise _Gone


def figures(report: Report) -> list[tuple[str, str]]:
    """Write the quantities of a report for people.

    Args:
        report: of a prompt with media and the answer to it.
    """
    seconds = report.seconds
    first = sum(seconds.get(phase, 0.0) for phase in ("vision", "selection", "prefill"))
    found = [
        ("visual tokens into the LLM", f"{report.entered_tokens} of {report.visual_tokens}"),
        ("per layer, average", f"{report.layer_average:.0f}"),
        ("time to first token, this one run", f"{1e3 * first:.0f} ms"),
        ("LLM prefill", f"{report.flops / 1e9:.2f} of {report.full_flops / 1e9:.2f} GMAC"),
        ("KV cache", f"{report.kv_bytes / 1e6:.2f} of {report.full_kv_bytes / 1e6:.2f} MB"),
    ]
    if report.decode_steps and seconds.get("decode"):
        found.insert(3, ("decoding", f"{report.decode_steps / seconds['decode']:.0f} steps/s"))
    return found


def _check(paths: Sequence[Any], question: str, frames: int, max_new_tokens: int) -> None:
    if not paths:
        raise ValueError("there is nothing to ask about yet: choose images, or one video")
    if not question.strip():
        raise ValueError("the question is empty; type one")
    for name, value, most in (
        ("question", len(question), LONGEST_QUESTION),
        ("frames", frames, MOST_FRAMES),
        ("max_new_tokens", max_new_tokens, MOST_NEW_TOKENS),
    ):
        if not 1 <= value <= most:
            unit = " characters" if name == "question" else ""
            raise ValueError(f"{name} must be 1 to {most}{unit}, got {value}")


def _failure(error: BaseException) -> Pane:
    foreseen = isinstance(error, OSError | TypeError | ValueError | ImportError)
    text = one_line(str(error)) or "no message"
    return Pane(note=text if foreseen else f"unexpected {type(error).__name__}: {text}", failed=True)
