"""Yes or no: how POPE and MME read an answer, and what they make of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MME_PERCEPTION: tuple[str, ...] = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION: tuple[str, ...] = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_MME_PREFIX = 4


def pope_label(text: str) -> Literal["yes", "no"]:
    """Read an answer as POPE's tool (Li et al., 2023) and LLaVA's do: whatever does not deny is a yes.

    Example:
        >>> pope_label("There is not a dog."), pope_label("Nope"), pope_label("NO")
        ('no', 'yes', 'yes')
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_label(text: str) -> Literal["yes", "no", "other"]:
    """Read an answer as MME's tool (Fu et al., 2023) does: by its first four letters.

    Example:
        >>> mme_label("Nothing"), mme_label("The answer is no"), mme_label("y")
        ('no', 'other', 'yes')
    """
    lowered = text.lower().strip().replace(".", "")
    head = lowered[:_MME_PREFIX]
    if lowered == "y" or "yes" in head:
        return "yes"
    return "no" if lowered == "n" or "no" in head else "other"


@dataclass(frozen=True)
class YesNoFigures:
    """What POPE reports, from 0 to 1; "yes" is the positive class.

    Attributes:
        accuracy: share of right answers.
        precision: share of right ones among the answers "yes"; 0.0 if there is none.
        recall: share of the questions with answer "yes" that were given it; 0.0 if there is none.
        f1: harmonic mean of the two; 0.0 if both are.
        yes_ratio: share of the answers "yes".
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no_figures(predicted: Sequence[str], expected: Sequence[str]) -> YesNoFigures:
    """Count yes and no.

    Args:
        predicted: labels read from the answers; anything but ``"yes"`` counts as a denial, and as wrong unless
            it is the expected label.
        expected: ``"yes"`` or ``"no"`` for each.

    Raises:
        ValueError: if the lengths differ or there are none.

    Example:
        >>> yes_no_figures(["yes", "yes", "no", "yes"], ["yes", "no", "no", "yes"])
        YesNoFigures(accuracy=0.75, precision=0.6666666666666666, recall=1.0, f1=0.8, yes_ratio=0.75)
    """
    if len(predicted) != len(expected) or not expected:
        raise ValueError(f"predicted: {len(predicted)} labels for {len(expected)} questions; must be one for each")
    hits = sum(found == wanted == "yes" for found, wanted in zip(predicted, expected, strict=True))
    right = sum(found == wanted for found, wanted in zip(predicted, expected, strict=True))
    said, asked = list(predicted).count("yes"), list(expected).count("yes")
    return YesNoFigures(
        accuracy=right / len(expected),
        precision=hits / said if said else 0.0,
        recall=hits / asked if asked else 0.0,
        f1=2 * hits / (said + asked) if said + asked else 0.0,
        yes_ratio=said / len(expected),
    )


def mme_scores(answers: Iterable[tuple[str, str, bool]]) -> Mapping[str, float]:
    """Sum up MME.

    A category earns its accuracy plus the share of images with all questions right, in percent: at most 200.

    Args:
        answers: category, image and whether the answer was right, for every question.

    Returns:
        ``"perception"`` (at most 2000), ``"cognition"`` (at most 800), ``"total"``, then each category met.

    Example:
        >>> right = {"1": (True, True), "2": (True, False)}
        >>> scores = mme_scores(("count", image, said) for image in right for said in right[image])
        >>> scores["count"], scores["perception"], scores["cognition"]
        (125.0, 125.0, 0)
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for category, image, right in answers:
        images.setdefault(category, {}).setdefault(image, []).append(right)
    scores: dict[str, float] = {}
    for category, found in images.items():
        every = [right for answers_of_image in found.values() for right in answers_of_image]
        both = sum(all(answers_of_image) for answers_of_image in found.values()) / len(found)
        scores[category] = 100 * (sum(every) / len(every) + both)
    perception = sum(scores.get(name, 0) for name in MME_PERCEPTION)
    cognition = sum(scores.get(name, 0) for name in MME_COGNITION)
    return {"perception": perception, "cognition": cognition, "total": perception + cognition} | scores
