"""Trees of chosen tokens: followed greedily, along drawn tokens, and child by child."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.speculative.base import Draft
from mmfast.speculative.verify import draw, greedy, reject_tree, try_tree, walk
from support.acceptance import doubles


def check(cases: list[dict[str, Any]]) -> None:
    """Compare paths, tokens, and how many random numbers were used."""
    for case in cases:
        draft = Draft(tuple(case["tokens"][1:]), tuple(case["parents"][1:]))
        exact = doubles(case["node_probs"])
        for laws in (exact, exact.float()):
            _greedy(case, draft, laws)
            _match(case, draft, laws)
            weights = _reject(case, draft, laws)
            if laws is exact:
                expected = doubles(case["sequential_rejection"]["final_distribution"])
                torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0.0)
        reached = sum(
            float(exact[0, token])
            for token in range(exact.shape[-1])
            if len(walk(draft, lambda node, _, token=token: token if node == 0 else -1).path) > 1
        )
        assert abs(reached - case["prob_first_level_accept"]) <= 1e-12, case["name"]


def _greedy(case: dict[str, Any], draft: Draft, laws: torch.Tensor) -> None:
    accepted, expected = greedy(draft, laws), case["greedy"]
    assert laws.argmax(dim=-1).tolist() == expected["node_argmax"], case["name"]
    assert list(accepted.path) == expected["accepted_path"], case["name"]
    assert accepted.token == expected["bonus_token"], case["name"]
    assert _emitted(draft, accepted.path, accepted.token) == expected["emitted"], case["name"]


def _match(case: dict[str, Any], draft: Draft, laws: torch.Tensor) -> None:
    expected = case["sample_match"]
    uniforms, used = iter(expected["uniforms"]), []

    def choose(node: int, tokens: tuple[int, ...]) -> int:
        assert tokens == tuple(_emitted(draft, _path(case, node)))
        used.append(next(uniforms))
        return draw(laws[node], used[-1])

    accepted = walk(draft, choose)
    assert list(accepted.path) == expected["accepted_path"], case["name"]
    assert accepted.token == expected["bonus_token"], case["name"]
    assert len(used) == expected["uniforms_used"], case["name"]
    assert _emitted(draft, accepted.path, accepted.token) == expected["emitted"], case["name"]


def _reject(case: dict[str, Any], draft: Draft, laws: torch.Tensor) -> torch.Tensor:
    expected = case["sequential_rejection"]
    used: list[float] = []
    uniforms = iter(expected["uniforms"])

    def uniform() -> float:
        used.append(next(uniforms))
        return used[-1]

    def law(node: int, tokens: tuple[int, ...]) -> torch.Tensor:
        assert tokens == tuple(_emitted(draft, _path(case, node)))
        return laws[node]

    stopped = try_tree(draft, law, uniform)
    assert list(stopped.path) == expected["accepted_path"], case["name"]
    assert len(used) == expected["uniforms_used"], case["name"]
    accepted = reject_tree(draft, law, iter([*used, expected["u_bonus"]]).__next__)
    assert accepted.path == stopped.path, case["name"]
    assert accepted.token == expected["bonus_token"], case["name"]
    assert _emitted(draft, accepted.path, accepted.token) == expected["emitted"], case["name"]
    return stopped.weights


def _path(case: dict[str, Any], node: int) -> list[int]:
    path = [node]
    while path[0] > 0:
        path.insert(0, case["parents"][path[0]])
    return path


def _emitted(draft: Draft, path: Any, *last: int) -> list[int]:
    return [*(draft.tokens[node - 1] for node in path[1:]), *last]
