"""Rows behind left padding that accept different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.speculative.base import Draft
from mmfast.speculative.batch import after_paths, realigned
from mmfast.speculative.tree import positions, visibility


def check(cases: list[dict[str, Any]]) -> None:
    """Compare masks and positions before and after, with holes and without."""
    for case in cases:
        lengths, nodes, expected = torch.tensor(case["prompt_lengths"]), case["gamma"] + 1, case["expected"]
        width = int(lengths.max())
        assert width == expected["width_before"]
        assert (width - lengths).tolist() == expected["left_pad"]
        valid = torch.arange(width) >= (width - lengths)[:, None]
        parents = Draft((0,) * case["gamma"]).tree()
        assert visibility(valid, parents)[:, -1].int().tolist() == expected["verify_attention_mask"]
        rows = [positions(parents, int(row.sum())).tolist() for row in valid]
        assert rows == expected["verify_position_ids"]

        after = after_paths(valid, [range(count + 1) for count in case["n_accepted"]], nodes)
        assert after.int().tolist() == expected["holes"]["attention_mask_after"]
        assert after.sum(dim=-1).tolist() == expected["holes"]["next_position"]

        gather, moved = realigned(after), expected["realign"]
        assert gather.shape[-1] == moved["new_width"]
        assert gather.tolist() == moved["gather_indices"]
        aligned = after.gather(-1, gather.clamp(min=0)) & (gather >= 0)
        assert aligned.int().tolist() == moved["attention_mask_after"]
        assert aligned.sum(dim=-1).tolist() == moved["next_position"]
