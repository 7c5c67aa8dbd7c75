"""Rows behind left padding that accept different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.cache import LogicalLayer
from mmfast.kv.cache import Announcement
from mmfast.speculative.base import Draft
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

        layer, after = grown(valid, nodes, case["n_accepted"]), torch.tensor(expected["holes"]["attention_mask_after"])
        assert layer.real_entries()[:, 0].sum(dim=-1).tolist() == expected["holes"]["next_position"]
        assert columns(layer) == [row.nonzero().squeeze(-1).tolist() for row in after]

        moved = expected["realign"]
        layer.compact(layer.real_entries())
        assert layer.stored == moved["new_width"]
        real = layer.real_entries()[:, 0]
        assert torch.where(real, layer.keys[:, 0, :, 0].long(), -1).tolist() == moved["gather_indices"]
        assert real.int().tolist() == moved["attention_mask_after"]
        assert real.sum(dim=-1).tolist() == moved["next_position"]


def grown(valid: Tensor, nodes: int, accepted: list[int]) -> LogicalLayer:
    """Store a padded prompt and a block of nodes, and keep what each row accepts; a key tells its column."""
    batch, width = valid.shape
    layer = LogicalLayer()
    for start, count, real in ((0, width, valid), (width, nodes, None)):
        layer.announced = Announcement(count, real, torch.arange(count).expand(batch, count))
        keys = torch.arange(start, start + count).float()[None, None, :, None].expand(batch, 1, -1, 1)
        layer.update(keys, keys)
    kept = torch.tensor(accepted) + 1
    places = torch.arange(int(kept.max())).expand(batch, -1)
    layer.keep_block(nodes, places, places < kept[:, None])
    return layer


def columns(layer: LogicalLayer) -> list[list[int]]:
    """Return, row by row, from which columns what is stored came."""
    real = layer.real_entries()[:, 0]
    return [row[own].long().tolist() for row, own in zip(layer.keys[:, 0, :, 0], real, strict=True)]
