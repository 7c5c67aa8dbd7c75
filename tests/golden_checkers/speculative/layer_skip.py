"""Which sublayers SWIFT leaves out, and how wide its combs are."""

from __future__ import annotations

from typing import Any

from mmfast.speculative.drafters.swift import candidate_widths
from mmfast.speculative.skipping import SkipSearch, initial_skips, searched_sublayers


def check(case: dict[str, Any]) -> None:
    """Compare skip sets by the size of the model, and widths by probabilities."""
    for item in case["skip_sets"]:
        depth, ratio, expected = item["num_layers"], item["skip_ratio"], item["expected"]
        count = expected["n_sublayers_skipped_by_search"]
        assert searched_sublayers(depth, ratio) == count, item
        search = SkipSearch(depth, (), count)
        for skips in (initial_skips(depth), search.best):
            assert list(skips.attention) == expected["initial_attn_skip"], item
            assert list(skips.feed_forward) == expected["initial_mlp_skip"], item
        search.tell(0.5)
        assert len(search.trial.attention) + len(search.trial.feed_forward) == count, item
    for item in case["candidate_widths"]:
        widths = candidate_widths(item["top1_probs"], item["mode"])
        assert widths == item["expected"]["candidates_per_depth"], item
        assert sum(widths) == item["expected"]["n_nodes"], item
