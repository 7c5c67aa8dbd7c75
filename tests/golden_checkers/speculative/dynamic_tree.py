"""Trees that grow where the drafter is sure of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfast.speculative.tree import Frontier, ancestors, depths, grow, grow_scored, leaf_paths


def check(cases: list[dict[str, Any]]) -> None:
    """Compare every tree with that of a drafter who looks at the last token only."""
    for case in cases:
        table = torch.tensor(case["log_prob_table"], dtype=torch.float64)
        root, limits = case["root_token"], {"depth": case["depth"], "top_k": case["top_k"]}

        def expand(frontier: Frontier, table: torch.Tensor = table) -> torch.Tensor:
            return table[frontier.tokens]

        everything = grow(table[root], expand, total_tokens=10**6, **limits)
        assert len(everything.tokens) == case["n_candidates"], case["name"]

        draft, scores = grow_scored(table[root], expand, total_tokens=case["total_tokens"], **limits)
        expected, parents = case["expected"], draft.tree()
        assert [root, *draft.tokens] == expected["tokens"], case["name"]
        assert list(parents) == expected["parents"], case["name"]
        assert [0.0, *scores] == pytest.approx(expected["cum_log_prob"], abs=1e-12), case["name"]
        assert ancestors(parents).int().tolist() == expected["ancestor_mask"], case["name"]
        assert list(depths(parents)) == expected["depth"], case["name"]
        assert leaf_paths(parents).tolist() == expected["leaf_paths"], case["name"]
