"""Images that are cut into crops, laid out as they are left after unpadding."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.tokens import Layout


def anyres(grid: tuple[int, int], side: int, above: int = 0, left: int = 0) -> tuple[Layout, Tensor]:
    """Lay out a whole image and its crops, without newline tokens.

    Args:
        grid: rows and columns of crops.
        side: tokens per side of a tile.
        above: rows of padding that are gone above and below the grid of all crops.
        left: the same of columns.

    Returns:
        The layout, and int64 ``[N]``: the number of each token among those of all tiles with their padding.
    """
    high, wide = grid[0] * side, grid[1] * side
    whole, crops = Layout.grid(side, side), Layout.grid(high - 2 * above, wide - 2 * left)
    row, col = crops.row + above, crops.col + left
    crop = row // side * grid[1] + col // side
    count = len(whole) + len(crops)
    layout = Layout(
        "image",
        torch.zeros(count, dtype=torch.int64),
        torch.cat([whole.tile, crops.tile + 1]),
        torch.cat([whole.row, crops.row]),
        torch.cat([whole.col, crops.col]),
        torch.zeros(count, dtype=torch.bool),
        crop=torch.cat([whole.tile - 1, crop]),
        crop_grid=grid,
    )
    places = (1 + crop) * side * side + row % side * side + col % side
    return layout, torch.cat([torch.arange(len(whole)), places])
