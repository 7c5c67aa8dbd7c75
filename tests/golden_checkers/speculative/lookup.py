"""Texts searched for what followed their last tokens before."""

from __future__ import annotations

from typing import Any

import pytest

from mmfast.speculative.drafters.prompt_lookup import Match, Ngrams
from mmfast.speculative.drafters.suffix import SuffixTree


def check(case: dict[str, Any]) -> None:
    """Compare what three drafters find."""
    for one in case["prompt_lookup"]:
        _prompt_lookup(one)
    for one in case["copyspec"]:
        text = Ngrams(one["gamma"], one["gamma"], policy="first")
        text.extend(one["ids"])
        match = text.find(text.tail, one["num_copy"])
        assert {"draft": list(match.draft), "match_start": match.start} == one["expected"], one
    for one in case["suffix"]["cases"]:
        _suffix(one, case["suffix"]["corpus"])


def _prompt_lookup(one: dict[str, Any]) -> None:
    def found(policy: Any, excluded: list[int]) -> Match:
        text = Ngrams(one["max_ngram"], 1, excluded, policy)
        text.extend(one["ids"])
        return text.find(text.tail, one["num_tokens"])

    for policy in ("first", "last"):
        match, expected = found(policy, one["excluded"]), one["expected"][policy]
        assert list(match.draft) == expected["draft"], (one["name"], policy)
        assert (match.ngram, match.start) == (expected["ngram"], expected["match_start"]), (one["name"], policy)
    unsafe = one["expected"]["without_exclusion_first"]
    assert list(found("first", []).draft) == unsafe["draft"], one["name"]


def _suffix(one: dict[str, Any], corpus: list[list[int]]) -> None:
    tree = SuffixTree(one["max_depth"])
    for text in corpus:
        tree.extend([*text, -1])
    limits = (one["max_spec_tokens"], one["max_spec_factor"], one["max_spec_offset"], one["min_token_prob"])
    context: list[Any] = []
    for token in one["context"]:
        context = tree.step(context, token)
    assert context == tree.match(one["context"]), one
    found, expected = tree.speculate(context, *limits), one["expected"]
    assert list(found.tokens) == expected["tokens"], one
    assert found.match == expected["match_len"], one
    assert list(found.probs) == pytest.approx(expected["probs"], abs=1e-12), one
    assert found.score == pytest.approx(expected["score"], abs=1e-12), one
