"""Answers that are numbers: ChartQA's five percent, and MMMU's open questions."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOLERANCE = 0.05

_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_EMPTY_TAILS = frozenset(":,.!?;'")
_WRITTEN_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def relaxed_accuracy(prediction: str, answer: str, tolerance: float = _TOLERANCE) -> float:
    """Score as ChartQA (Masry et al., 2022): numbers within 5 %, all else exact but for case.

    A percent sign divides by 100, on both sides. An expected 0 allows nothing but the same string.

    Args:
        prediction: the raw text.
        answer: the expected answer.
        tolerance: largest relative difference.

    Example:
        >>> relaxed_accuracy("104", "100"), relaxed_accuracy("106", "100"), relaxed_accuracy("5%", "0.05")
        (1.0, 0.0, 1.0)
        >>> relaxed_accuracy("Blue", "blue")
        1.0
    """
    found, wanted = _number(prediction.strip()), _number(answer.strip())
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= tolerance)
    return float(prediction.strip().lower() == answer.strip().lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mmmu_open(prediction: str, answers: Sequence[str]) -> float:
    """Score an open question as MMMU (Yue et al., 2023).

    From each line what follows a cue ("so", "is", "answer", ...) is taken, numbers in it too. A number
    counts if it equals an answer to two decimals, a text if it holds an answer.

    Args:
        prediction: the raw text.
        answers: accepted answers.

    Example:
        >>> mmmu_open("So the total is 1,234.567.", ["1234.57"]), mmmu_open("It is the Nile", ["nile"])
        (1.0, 1.0)
        >>> mmmu_open("12", ["1"])
        0.0
    """
    wanted = [form for answer in answers for form in _forms(answer)]
    tails = _tails(prediction)
    numbers = [number for tail in tails for pattern in _WRITTEN_NUMBERS for number in pattern.findall(tail)]
    for found in (form for text in (*tails, *numbers) for form in _forms(text)):
        if isinstance(found, float):
            if found in wanted:
                return 1.0
        elif any(isinstance(answer, str) and answer in found for answer in wanted):
            return 1.0
    return 0.0


def _forms(text: str) -> list[str | float]:
    """The forms that a text is compared in: a rounded number, or lower case."""
    stripped = text.strip()
    try:
        return [round(float(stripped.replace(",", "")), 2)]
    except ValueError:
        lowered = stripped.lower()
    # A single letter is in nearly every word, so a space must stand beside it.
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _tails(prediction: str) -> list[str]:
    """What follows the cue that leaves the least, for each line with a cue; else the whole text."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for place, line in enumerate(lines):
        # An equation counts where the answer ends with it.
        cues = (*_CUES, "=") if place == len(lines) - 1 else _CUES
        tails = [line.split(cue)[-1].strip() for cue in cues if cue in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest and shortest not in _EMPTY_TAILS:
            found.append(shortest)
    return found or [text]
