"""From the patches of a vision encoder to visual tokens: the parts of a tower, and how patches are pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_BLOCKS = ("encoder.layers", "encoder.layer", "blocks", "transformer.layers", "layers")
_PLAIN = frozenset({"clip_vision_model", "siglip_vision_model"})
_CLASS_TOKENS = ("class_embedding", "cls_token")


def tower_blocks(tower: Any) -> Sequence[nn.Module]:
    """Find the transformer blocks of a vision encoder, first to last.

    Raises:
        ValueError: if they are not where they are expected.
    """
    for path in _BLOCKS:
        found = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    raise ValueError(
        f"cannot find the blocks of the vision encoder {type(tower).__name__}, so methods that read it cannot run on "
        "this model; use one that needs no signals of the vision encoder"
    )


def has_class_token(tower: Any) -> bool:
    """Say whether a vision encoder puts a class token before the patches."""
    embeddings = getattr(tower, "embeddings", None)
    return any(getattr(embeddings, name, None) is not None for name in _CLASS_TOKENS)


def is_plain(tower: Any) -> bool:
    """Say whether a vision encoder is a stack of blocks over ``[B, n, C]``, without windows or rotary positions."""
    return getattr(tower.config, "model_type", None) in _PLAIN


def pool_grid(patches: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Average groups of ``factor x factor`` patches; rows and columns that fill no group are left out.

    Args:
        patches: ``[height * width, C]`` in raster order.
        height: rows of patches.
        width: columns of patches.
        factor: side of a group.

    Returns:
        ``[(height // factor) * (width // factor), C]`` in raster order.

    Example:
        >>> import torch
        >>> pool_grid(torch.arange(8.0)[:, None], 2, 4, 2).flatten().tolist()
        [2.5, 4.5]
    """
    rows, cols, size = height // factor, width // factor, patches.shape[-1]
    grid = patches.reshape(height, width, size)[: rows * factor, : cols * factor]
    return grid.reshape(rows, factor, cols, factor, size).mean(dim=(1, 3)).reshape(rows * cols, size)


def pool_square(patches: Tensor, tokens: int) -> Tensor:
    """Average the patches of a square tile down to a smaller square.

    Args:
        patches: ``[N, C]`` in raster order.
        tokens: number of tokens that the model makes of them.

    Raises:
        ValueError: if they are no such squares.
    """
    if len(patches) == tokens:
        return patches
    side, wanted = math.isqrt(len(patches)), math.isqrt(tokens)
    if side * side != len(patches) or wanted * wanted != tokens or not 0 < wanted < side:
        raise ValueError(f"{len(patches)} patches of the vision encoder cannot be aligned with {tokens} visual tokens")
    return pool_grid(patches, side, side, side // wanted)


def align_tiles(maps: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Align the patches of square tiles, or of one packed sequence, with one item each.

    Args:
        maps: ``[tiles, N, C]``, or ``[1, sum of the items, C]`` from an encoder that packs.
        features: ``[n, D]`` per item.

    Returns:
        ``[n, C]`` per item.

    Raises:
        ValueError: if the numbers do not fit.
    """
    counts = [len(item) for item in features]
    if maps.shape[0] == 1 and maps.shape[1] == sum(counts):
        return list(maps[0].split(counts))
    if maps.shape[0] != len(counts):
        raise ValueError(f"{maps.shape[0]} tiles of the vision encoder cannot be aligned with {len(counts)} items")
    return [pool_square(tile, count) for tile, count in zip(maps, counts, strict=True)]
