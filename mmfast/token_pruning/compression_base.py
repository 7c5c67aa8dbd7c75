"""What methods with compression tokens decide: what such tokens stand for, and who no longer sees that."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.token_pruning.layers import LayerMask
from mmfast.tokens import Layout


@dataclass(frozen=True)
class Hidden:
    """Places of a prompt that nobody sees from some place on.

    Attributes:
        start: the first place that does not see them.
        places: ``[h]`` int64, ascending, all of them before ``start``.
    """

    start: int
    places: Tensor


@dataclass(frozen=True)
class Compressor(LayerMask):
    """Let marked tokens of a prompt read images, and hide from later tokens what they have read.

    What is hidden from every token after the prompt leaves the caches of all layers when the prompt has been read.
    """

    kind: ClassVar[str] = "Compressor"

    def visible(self, media: Sequence[Tensor], text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return nothing: no token sees more than causality allows."""
        return []

    @abstractmethod
    def hidden(self, media: Sequence[Tensor], text: Tensor, marked: Tensor) -> list[Hidden]:
        """Say what is hidden in one prompt, and from where on.

        Args:
            media: ``[n]`` int64 places of the visual tokens, one tensor per image or video, in the order of the prompt.
            text: ``[t]`` int64 places of all other tokens, ascending, marked ones included.
            marked: ``[c]`` int64 places of the compression tokens, ascending.
        """


def runs(places: Tensor) -> list[Tensor]:
    """Cut ascending places into runs of neighbours.

    Args:
        places: ``[n]`` int64.

    Example:
        >>> [run.tolist() for run in runs(torch.tensor([2, 3, 7]))]
        [[2, 3], [7]]
    """
    breaks = (places[1:] - places[:-1] > 1).nonzero().flatten() + 1
    return [run for run in places.tensor_split(breaks.cpu()) if run.numel()]


def own_parts(layouts: Sequence[Layout], count: int) -> Tensor:
    """Divide what ``count`` compression tokens read among them, from the coarse to the fine.

    The first token has everything, and so has the second; then two have a half each, four a quarter, and so on. What
    a token has does not depend on how many follow, which it cannot see. One picture is cut into about square parts in
    raster order; a video, several images, or one whose grid is not known, into runs of about equal length.

    Args:
        layouts: of the images or videos, N tokens in all.
        count: of the compression tokens.

    Returns:
        bool ``[count, N]``. Parts are empty where there are fewer rows or columns than parts.

    Example:
        >>> own_parts([Layout.grid(2, 2)], 4).int().tolist()
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    """
    levels = [0, *(number.bit_length() - 1 for number in range(1, count))]
    own = [0, *(number - (1 << level) for number, level in enumerate(levels[1:], start=1))]
    cuts = [_cut(layouts, level) for level in range(max(levels) + 1)]
    return torch.stack([cuts[level] == part for level, part in zip(levels, own, strict=True)])


def _cut(layouts: Sequence[Layout], level: int) -> Tensor:
    """Return the number of the part of each token, ``[N]`` int64, of ``2 ** level`` parts."""
    first = layouts[0]
    if len(layouts) > 1 or not first.grid_known or bool((first.tile > 0).any()) or bool((first.frame > 0).any()):
        total = sum(len(layout) for layout in layouts)
        return (torch.arange(total) << level) // max(total, 1)
    down, across = 1 << (level + 1) // 2, 1 << level // 2
    height, width = int(first.row.max()) + 1, int(first.col.max()) + 1
    # Newline tokens have no column; they go with the last of their row.
    column = torch.where(first.col < 0, width - 1, first.col)
    return first.row * down // height * across + column * across // width


def compressed_mask(real: Tensor, hidden: Sequence[Hidden]) -> Tensor:
    """Write out who sees whom in ONE prompt: causality, less what is hidden.

    Args:
        real: ``[n]`` bool, False where a place is padding, which nobody sees.
        hidden: as :meth:`Compressor.hidden` gives it.

    Returns:
        bool ``[n, n]``, True = visible.

    Example:
        >>> compressed_mask(torch.ones(3, dtype=torch.bool), [Hidden(2, torch.tensor([0]))]).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    mask = torch.ones(real.numel(), real.numel(), dtype=torch.bool, device=real.device).tril()
    for one in hidden:
        mask[one.start :, one.places] = False
    return mask & real
