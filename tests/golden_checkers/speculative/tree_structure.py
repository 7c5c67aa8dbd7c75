"""Who sees whom in a tree, where each node stands, what of the cache stays."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.speculative.tree import (
    ancestors,
    children,
    depths,
    kept_entries,
    leaf_paths,
    leaves,
    positions,
    visibility,
)


def check(cases: list[dict[str, Any]]) -> None:
    """Compare every tree, behind a padded prompt and after a path was accepted."""
    for case in cases:
        parents, expected, prefix, after = case["parents"], case["expected"], case["with_prefix"], case["compaction"]
        name = case["name"]
        assert ancestors(parents).int().tolist() == expected["ancestor_mask"], name
        assert list(depths(parents)) == expected["depth"], name
        assert list(map(list, children(parents))) == expected["children"], name
        assert list(leaves(parents)) == expected["leaves"], name
        assert leaf_paths(parents).tolist() == expected["leaf_paths"], name

        cached, pad = prefix["prefix_len"], prefix["left_pad"]
        valid = torch.arange(cached) >= pad
        assert visibility(valid, parents).int().tolist() == prefix["attention_mask_4d_bool"], name
        batch = visibility(valid.expand(1, cached), parents)
        assert batch.int().tolist() == [prefix["attention_mask_4d_bool"]], name
        start, delta = int(valid.sum()), prefix["mrope"]["delta"]
        assert positions(parents, start).tolist() == prefix["position_ids"], name
        text, *others = positions(parents, start, (delta, delta, delta)).tolist()
        assert text == prefix["mrope"]["text_row"], name
        assert others == [prefix["mrope"]["thw_rows"]] * 3, name

        path = after["accepted_node_path"]
        kept = kept_entries(cached, path)
        assert list(kept) == after["kv_gather_indices"], name
        assert len(kept) == after["new_len"], name
        assert start + len(path) == after["next_root_position"], name
        # The entries of a path are those its last node sees.
        seen = visibility(torch.ones(cached, dtype=torch.bool), parents)[path[-1]]
        assert seen.nonzero().flatten().tolist() == list(kept), name
