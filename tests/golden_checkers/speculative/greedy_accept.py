"""Chains whose tokens are compared with the likeliest ones."""

from __future__ import annotations

from typing import Any

from mmfast.speculative.base import Draft
from mmfast.speculative.verify import greedy, walk
from support.acceptance import doubles


def check(cases: list[dict[str, Any]]) -> None:
    """Compare what is accepted, what follows, and where an answer ends within the draft."""
    for case in cases:
        name, expected, logits = case["name"], case["expected"], doubles(case["logits"])
        draft = Draft(tuple(case["draft_tokens"]))
        accepted = greedy(draft, logits)
        count = len(accepted.path) - 1
        assert accepted.path == tuple(range(count + 1)), name
        assert count == expected.get("n_accepted", expected.get("n_accepted_before_stop")), name
        assert accepted.token == expected["next_token"], name

        emitted: list[int] = []

        def ended(token: int, emitted: list[int] = emitted, stop: int | None = case.get("eos_token")) -> bool:
            emitted.append(token)
            return token == stop

        walk(draft, lambda node, _, logits=logits: int(logits[node].argmax()), ended)
        assert emitted == expected["emitted"], name
