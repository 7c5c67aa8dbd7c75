"""Scores of the official tools: normalisation, accuracy, ANLS, yes and no, options, captions."""

from __future__ import annotations

from typing import Any

from mmfast.eval import metrics

CLOSE = 1e-9
# What the file writes where a tool guesses or gives up; here both are "nothing read".
UNREAD = {"<random>": "", "FAILED": ""}
PARSERS = ("mmmu_style", "priority_extract", "longvideobench", "scienceqa", "seed_first_char")


def check(cases: dict[str, Any]) -> None:
    """Compare every column of every case."""
    for case in cases["normalise"]:
        assert metrics.normalise_vqa(case["text"]) == case["vqa_official"], case
        assert metrics.normalise_evalai(case["text"]) == case["evalai"], case
    for case in cases["vqa_accuracy"]:
        for name in ("vqa_official", "textvqa_evalai"):
            assert abs(getattr(metrics, name)(case["prediction"], case["answers"]) - case[name]) <= CLOSE, case
    for case in cases["anls"]:
        _anls(case)
    for case in cases["yes_no"]:
        assert metrics.mme_label(case["text"]) == case["mme_label"], case
        assert metrics.pope_label(case["text"]) == case["pope_label"], case
    for case in cases["multiple_choice"]:
        _choice(case)
    for case in cases["cider_d"]:
        corpus, each = metrics.cider_d(case["hypotheses"], case["references"])
        assert abs(corpus - case["corpus"]) <= CLOSE, case
        assert max(abs(a - b) for a, b in zip(each, case["per_image"], strict=True)) <= CLOSE, case


def _anls(case: dict[str, Any]) -> None:
    prediction, references = case["prediction"], case["references"]
    assert abs(metrics.anls_docvqa(prediction, references) - case["anls_docvqa"]) <= CLOSE, case
    # The official code divides by zero where both are empty; that is a match here.
    expected = 1.0 if case["anls_stvqa"] is None else case["anls_stvqa"]
    assert abs(metrics.anls_stvqa(prediction, references) - expected) <= CLOSE, case
    plain = [" ".join(text.lower().split()) for text in (prediction, *references)]
    assert [metrics.levenshtein(plain[0], other) for other in plain[1:]] == case["levenshtein"], case


def _choice(case: dict[str, Any]) -> None:
    options = [case["options"][letter] for letter in case["choices"]]
    assert metrics.letters_of(options) == "".join(case["choices"]), case
    for name in PARSERS:
        found = metrics.PARSERS[name](case["text"], options)
        assert found == UNREAD.get(case[name], case[name]), (name, found, case)
    assert int(metrics.mvbench(case["text"], options) == "B") == case["mvbench_is_B"], case
