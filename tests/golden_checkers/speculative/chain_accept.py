"""Drawn chains: what is accepted, what the rest is drawn from, what it all amounts to."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.speculative.verify import Accepted, reject, try_chain
from support.acceptance import acceptance, chain, doubles, enumerate_rounds


def check(case: dict[str, Any]) -> None:
    """Run each chain with its own uniforms, in float32 too; then over all drafts and uniforms."""
    for item in case["cases"]:
        weights = _decide(item, torch.float64)
        _decide(item, torch.float32)
        _integrate(item, weights)


def _decide(item: dict[str, Any], kind: torch.dtype) -> torch.Tensor:
    name, expected = item["name"], item["expected"]
    p, q = doubles(item["p"]).to(kind), doubles(item["q"]).to(kind)
    draft = chain(item["draft_tokens"], q)

    def law(node: int, tokens: tuple[int, ...]) -> torch.Tensor:
        assert tokens == draft.tokens[:node]
        return p[node]

    stopped = try_chain(draft, law, iter(item["u"]).__next__)
    count = len(stopped.path) - 1
    assert count == expected["n_accepted"], name
    tested = item["u"][: min(count + 1, len(draft.tokens))]
    accepted = reject(draft, law, iter([*tested, item["u_bonus"]]).__next__)
    assert accepted == Accepted(tuple(range(count + 1)), expected["next_token"]), name
    assert [*draft.tokens[:count], accepted.token] == expected["emitted"], name
    return stopped.weights


def _integrate(item: dict[str, Any], weights: torch.Tensor) -> None:
    name, expected, tokens = item["name"], item["expected"], item["draft_tokens"]
    p, q = doubles(item["p"]), doubles(item["q"])
    close = {"atol": 1e-12, "rtol": 0.0}
    torch.testing.assert_close(weights, doubles(expected["residual_distribution"]), **close)
    shares = [acceptance(p[i], q[i]) for i in range(len(tokens))]
    chances = [float(share[token]) for share, token in zip(shares, tokens, strict=True)]
    assert torch.allclose(doubles(chances), doubles(expected["accept_prob_per_position"]), **close), name
    if "expected_acceptance_rate" in expected:
        rates = doubles([float((q[i] * share).sum()) for i, share in enumerate(shares)])
        torch.testing.assert_close(rates, doubles(expected["expected_acceptance_rate"]), **close)
        torch.testing.assert_close(1 - rates, doubles(expected["tv"]), **close)
    if "exact_first_token_distribution" in expected:
        first = enumerate_rounds(
            lambda tokens: p[len(tokens)], lambda _: q[0] if len(q) else p[0], min(1, len(q)), 1
        ).joint
        torch.testing.assert_close(first, doubles(expected["exact_first_token_distribution"]), **close)
        torch.testing.assert_close(first, p[0] / p[0].sum(), **close)
