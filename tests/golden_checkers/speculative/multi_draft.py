"""Several candidates for one position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from mmfast.speculative.base import Draft
from mmfast.speculative.tree import grow
from mmfast.speculative.verify import draw, k_seq, residual, try_siblings, walk, without_replacement
from support.acceptance import acceptance, doubles, integrate_siblings

Laws = Callable[[Tensor, Sequence[int]], Iterable[Tensor]]
CLOSE = {"atol": 1e-12, "rtol": 0.0}


def check(cases: list[dict[str, Any]]) -> None:
    """Run the given candidates, then go through all that could have been drawn."""
    for case in cases:
        p, q = doubles(case["p"]), doubles(case["q"])
        _siblings(case, p, q, case["without_replacement"], without_replacement)
        _siblings(case, p, q, case["with_replacement"], lambda law, _: repeat(law))
        _k_seq(case, p, q)
        _chosen(case, p, q)
        assert abs(float((q * acceptance(p, q)).sum()) - case["single_draft_acceptance"]) <= 1e-12, case["name"]


def _siblings(case: dict[str, Any], p: Tensor, q: Tensor, expected: dict[str, Any], laws: Laws) -> None:
    tokens = expected["drafts"]
    place, weights = try_siblings(p, tokens, laws(q, tokens), iter(case["uniforms"]).__next__)
    accepted = None if place is None else tokens[place]
    assert accepted == expected["accepted_token"], case["name"]
    if place is None:
        torch.testing.assert_close(weights, doubles(expected["final_distribution"]), **CLOSE)
        assert draw(weights, case["u_bonus"]) == expected["token_out"], case["name"]
    else:
        assert expected["final_distribution"] is None
        assert accepted == expected["token_out"], case["name"]
    trace = _chances(p, tokens, laws(q, tokens))[: len(expected["accept_prob_trace"])]
    assert len(trace) == (len(tokens) if place is None else place + 1), case["name"]
    torch.testing.assert_close(doubles(trace), doubles(expected["accept_prob_trace"]), **CLOSE)

    accepted_share, output = integrate_siblings(p, lambda tokens: laws(q, tokens), case["k"])
    assert abs(accepted_share - expected["exact_acceptance_probability"]) <= 1e-12, case["name"]
    torch.testing.assert_close(output, p, **CLOSE)


def _chances(p: Tensor, tokens: Sequence[int], laws: Iterable[Tensor]) -> list[float]:
    found = []
    for token, law in zip(tokens, laws, strict=False):
        found.append(float(acceptance(p, law)[token]))
        p = residual(p, law)
    return found


def _k_seq(case: dict[str, Any], p: Tensor, q: Tensor) -> None:
    rule, expected, name = k_seq(p, q, case["k"]), case["k_seq"], case["name"]
    assert abs(rule.rho - expected["rho"]) <= 1e-9, name
    assert abs(rule.beta - expected["beta"]) <= 1e-9, name
    assert abs(rule.acceptance - expected["acceptance_probability"]) <= 1e-9, name
    torch.testing.assert_close(rule.residual, doubles(expected["residual_distribution"]), atol=1e-9, rtol=0.0)
    # One candidate is accepted with beta, and the tokens that come out are the model's.
    taken = q * acceptance(p, rule.drawn_from)
    assert abs(float(taken.sum()) - rule.beta) <= 1e-12, name
    output = taken / max(rule.beta, 1e-300) * rule.acceptance + (1 - rule.acceptance) * rule.residual
    torch.testing.assert_close(output, p, atol=1e-9, rtol=0.0)


def _chosen(case: dict[str, Any], p: Tensor, q: Tensor) -> None:
    expected, name = case["top_k_deterministic"], case["name"]
    logs = q.clamp(min=1e-300).log()
    draft = grow(logs, lambda _: logs, total_tokens=case["k"], depth=0, top_k=case["k"])
    assert list(draft.tokens) == expected["drafts"], name
    siblings = Draft(draft.tokens, (0,) * case["k"])
    accepted = sum(float(p[token]) for token in range(len(p)) if len(walk(siblings, _saying(token)).path) > 1)
    assert abs(accepted - expected["acceptance_probability"]) <= 1e-12, name


def _saying(token: int) -> Callable[[int, tuple[int, ...]], int]:
    return lambda node, _: token if node == 0 else -1
