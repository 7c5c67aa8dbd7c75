"""HiRED: budgets and kept tokens of every tile, by strips as the official code and by true regions."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.hired import crop_budgets, rated_regions, region_grid, strips
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import Layout, VisualTokens
from support.anyres import anyres


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image, with budgets as they are cut off and by what the method keeps."""
    late = torch.from_numpy(case["cls_attention_late"]).sum(dim=1)
    if "cls_attention_early" not in case:
        method = get("hired").method(keep=int(late.shape[1] * float(case["budget_rate"])))
        decision = method(VisualTokens(torch.zeros(late.shape[1], 1), _grid(late.shape[1]), signals={"late": late[0]}))
        kept = torch.arange(late.shape[1]) if decision is None else decision.indices
        np.testing.assert_array_equal(kept.numpy(), case["keep_idx"])
        np.testing.assert_array_equal(np.flatnonzero(case["keep_mask"]), case["keep_idx"])
        return
    early = torch.from_numpy(case["cls_attention_early"]).sum(dim=1)
    start = 0
    for image, tiles in enumerate(case["num_tiles"].tolist()):
        part = slice(start, start + tiles)
        grid = tuple(int(value) for value in case["grid_rows_cols"][image])
        for suffix, official in (("", True), ("_2d", False)):
            _one(case, early[part], late[part], grid, suffix, part, official=official)
        start += tiles


def _one(
    case: dict[str, np.ndarray],
    early: torch.Tensor,
    late: torch.Tensor,
    grid: tuple[int, int],
    suffix: str,
    part: slice,
    *,
    official: bool,
) -> None:
    tiles, total = late.shape
    alpha = float(case["alpha"])
    layout = _grid(total)
    side = int(layout.row.max()) + 1
    regions = strips(total, tiles - 1) if official else region_grid(layout.row, layout.col, (side, side), grid)
    kept = int(tiles * total * float(case["budget_rate"]))
    whole = min(int(kept * alpha), total)
    ratings = rated_regions(early[0], regions, tiles - 1, alpha, "count")
    budgets = [whole, *crop_budgets(ratings, min(kept - whole, (tiles - 1) * total), [total] * (tiles - 1))]
    np.testing.assert_array_equal(budgets, case[f"tile_budgets{suffix}"][part])
    mask = torch.zeros(tiles, total, dtype=torch.bool)
    for tile, budget in enumerate(budgets):
        mask[tile, highest_first(late[tile], budget)] = True
    np.testing.assert_array_equal(mask.numpy(), case[f"keep_mask{suffix}"][part].astype(bool))
    # The method itself: the same tokens, and unless it is to do as the official code what cutting off left over.
    joined, order = anyres(grid, side)
    signals = {"early": early.flatten()[order], "late": late.flatten()[order]}
    method = get("hired").method(keep=kept, alpha=alpha, compat="official" if official else None)
    decision = method(VisualTokens(torch.zeros(tiles * total, 1), joined, signals=signals))
    left = torch.arange(tiles * total) if decision is None else decision.indices
    assert len(left) == (sum(budgets) if official else kept)
    chosen = torch.zeros(tiles * total, dtype=torch.bool)
    chosen[order[left]] = True
    assert bool(chosen[mask.flatten()].all())


def _grid(total: int) -> Layout:
    side = round(total**0.5)
    return Layout.grid(side, side)
