"""Accuracy against ten human answers (VQAv2, OK-VQA, VizWiz, TextVQA), and GQA's exact match."""

from __future__ import annotations

from collections.abc import Sequence

from mmfast.eval.metrics.text import (
    normalise_evalai,
    normalise_gqa,
    normalise_vqa,
    one_line,
    strip_punctuation,
)

_AGREEMENT = 3  # others who must have said it for a full score
_TEXTVQA_ANSWERS = 10


def vqa_official(prediction: str, answers: Sequence[str]) -> float:
    """Score as the official VQA evaluator (Goyal et al., 2017).

    Each annotator in turn is left out, and the prediction earns a third for each of the others who gave it, at
    most 1. Nothing is normalised where all answers are the same string: ``"Yes"`` against ten times ``"yes"``
    scores 0.

    Args:
        prediction: the raw text.
        answers: one per annotator, ten in the published data sets.

    Returns:
        0.0 to 1.0.

    Raises:
        ValueError: if there are no answers.

    Example:
        >>> [vqa_official("red", ["red"] * n + ["blue"] * (10 - n)) for n in (0, 1, 2, 3, 4)]
        [0.0, 0.3, 0.6, 0.9, 1.0]
        >>> vqa_official("Yes", ["yes"] * 10)
        0.0
    """
    given = [one_line(answer) for answer in _checked(answers)]
    found = one_line(prediction)
    if len(set(given)) > 1:
        given, found = [normalise_vqa(answer) for answer in given], normalise_vqa(found)
    return _leave_one_out(found, given)


def textvqa_evalai(prediction: str, answers: Sequence[str]) -> float:
    """Score as EvalAI does for TextVQA and for VQAv2 submissions: always normalised.

    This is what tables of LLaVA and its kin print.

    Raises:
        ValueError: if there are not exactly ten answers.

    Example:
        >>> textvqa_evalai("Yes", ["yes"] * 10), textvqa_evalai("Red.", ["red"] * 3 + ["a dark red"] * 7)
        (1.0, 0.9)
    """
    if len(answers) != _TEXTVQA_ANSWERS:
        raise ValueError(f"answers: {len(answers)} given, must be exactly {_TEXTVQA_ANSWERS}; use vqa_official")
    return _leave_one_out(normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers])


def vqa_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """Score as lmms-eval does for VQAv2: :func:`vqa_official` without its exception for identical answers.

    Example:
        >>> vqa_lmms_eval("Yes", ["yes"] * 10)
        1.0
    """
    return _leave_one_out(normalise_vqa(prediction), [normalise_vqa(answer) for answer in _checked(answers)])


def gqa(prediction: str, answer: str, *, punctuation: bool = False) -> float:
    """Score exact match as GQA (Hudson & Manning, 2019) is reported for LLaVA.

    Args:
        prediction: the raw text.
        answer: the expected answer.
        punctuation: take punctuation out first, as lmms-eval does.

    Example:
        >>> gqa("Yes.", "yes"), gqa("t-shirt", "t shirt"), gqa("t-shirt", "t shirt", punctuation=True)
        (1.0, 0.0, 1.0)
    """
    texts = (prediction, answer)
    if punctuation:
        texts = (strip_punctuation(one_line(prediction)), strip_punctuation(one_line(answer)))
    return float(normalise_gqa(texts[0]) == normalise_gqa(texts[1]))


def _checked(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise ValueError("answers: none given, must be at least one")
    return answers


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    matches = sum(answer == prediction for answer in answers)
    # Those who said it see one match fewer among the others than those who did not.
    agreeing = min(_AGREEMENT, max(matches - 1, 0)) * matches
    rest = min(_AGREEMENT, matches) * (len(answers) - matches)
    return (agreeing + rest) / (_AGREEMENT * len(answers))
