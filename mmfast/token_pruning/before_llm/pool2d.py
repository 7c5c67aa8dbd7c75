"""Spatial average pooling: the baseline that merges instead of dropping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mmfast.registry import register
from mmfast.token_pruning.base import Merger
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.tokens import Keep, VisualTokens


@register("pool2d", stage="before_llm")
@dataclass(frozen=True)
class Pool2d(Merger):
    """Average-pool the patch grid of every frame and tile to a smaller grid.

    A grid of ``h x w`` becomes ``oh x ow`` with nearly the same aspect ratio and at most the wanted
    number of cells, so the count can be lower than ``keep``; each merged token takes the slot of the
    token nearest to the middle of its cell. Several frames or tiles share the budget equally.
    """

    fits_grid = True

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Pool each grid."""
        layout = tokens.layout
        if not layout.grid_known:
            raise ValueError(
                "pool2d needs to know the grid of the visual tokens, which this model's adapter cannot give for "
                "these inputs; pass pixel values instead of precomputed features, or use 'uniform'"
            )
        groups = _grids(tokens)
        if len(groups) > kept:
            # One cell each is too much: whole frames or tiles go.
            groups = [groups[index] for index in uniform_subset(len(groups), kept).tolist()]
        share = kept // len(groups)
        slots: list[int] = []
        sizes: list[float] = []
        features: list[Tensor] = []
        source = torch.full((len(tokens),), -1, dtype=torch.int64)
        for places, height, width in groups:
            new_height, new_width = pooled_grid(height, width, share)
            pooled = pool_grid(tokens.features[places], height, new_height, new_width)
            for row in range(new_height):
                top, bottom = _bin(row, height, new_height)
                for col in range(new_width):
                    left, right = _bin(col, width, new_width)
                    middle = ((top + bottom - 1) // 2) * width + (left + right - 1) // 2
                    slots.append(int(places[middle]))
                    sizes.append(float((bottom - top) * (right - left)))
            cell_of = _owner(height, new_height)[:, None] * new_width + _owner(width, new_width)[None, :]
            source[places] = cell_of.reshape(-1) + sum(part.shape[0] for part in features)
            features.append(pooled)
        device = tokens.features.device
        indices, order = torch.tensor(slots).sort()
        rank = order.argsort()
        return Keep(
            indices.to(device),
            torch.cat(features)[order.to(device)],
            torch.tensor(sizes)[order].to(device),
            torch.where(source >= 0, rank[source.clamp_min(0)], source).to(device),
        )


def pool_grid(features: Tensor, height: int, new_height: int, new_width: int) -> Tensor:
    """Average the cells of one grid; bin i of n over m covers ``floor(i m / n)`` to ``ceil((i+1) m / n)``.

    Args:
        features: ``[height * width, D]`` in raster order.
        height: rows of the grid.
        new_height: rows of the pooled grid.
        new_width: columns of the pooled grid.

    Returns:
        ``[new_height * new_width, D]`` in raster order, same dtype; averaged in float32.

    Example:
        >>> pool_grid(torch.arange(4.0)[:, None], 2, 1, 2).squeeze(-1).tolist()
        [1.0, 2.0]
    """
    grid = rearrange(features.float(), "(h w) d -> d h w", h=height)
    pooled = adaptive_avg_pool2d(grid, (new_height, new_width)).to(features.dtype)
    return rearrange(pooled, "d h w -> (h w) d")


def pooled_grid(height: int, width: int, limit: int) -> tuple[int, int]:
    """Return the largest grid of about the same aspect ratio with at most ``limit`` cells.

    Example:
        >>> pooled_grid(24, 24, 64), pooled_grid(16, 16, 25), pooled_grid(10, 40, 16)
        ((8, 8), (5, 5), (2, 8))
    """
    best = (1, 1)
    for new_height in range(1, min(height, limit) + 1):
        new_width = min(width, limit // new_height)
        candidate = (new_height, new_width)
        if _fit(candidate, height, width) > _fit(best, height, width):
            best = candidate
    return best


def _fit(candidate: tuple[int, int], height: int, width: int) -> float:
    """Cells won, discounted by how far the cells are from being square."""
    stretch = abs(math.log((candidate[0] / height) / (candidate[1] / width)))
    return candidate[0] * candidate[1] / (1.0 + stretch)


def _bin(index: int, size: int, bins: int) -> tuple[int, int]:
    return index * size // bins, -(-(index + 1) * size // bins)


def _owner(size: int, bins: int) -> Tensor:
    """For each input position the bin whose middle it belongs to (bins may overlap by one)."""
    return torch.div(torch.arange(size) * bins, size, rounding_mode="floor")


def _grids(tokens: VisualTokens) -> list[tuple[Tensor, int, int]]:
    """Split the tokens by frame and tile into full grids in raster order."""
    layout = tokens.layout
    keys = torch.stack([layout.frame, layout.tile], dim=-1)
    groups = []
    for key in torch.unique(keys, dim=0):
        places = (keys == key).all(dim=-1).nonzero().squeeze(-1)
        rows, cols = layout.row[places], layout.col[places]
        height = int(rows.max() - rows.min()) + 1
        width = int(cols.max() - cols.min()) + 1
        if height * width != places.numel():
            raise ValueError(
                f"pool2d needs full grids, but frame {int(key[0])}, tile {int(key[1])} has {places.numel()} tokens "
                f"on a grid of {height} x {width}; use 'uniform' for this model"
            )
        groups.append((places, height, width))
    return groups
