"""What methods with compression tokens decide: what such tokens stand for, and who no longer sees that."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.token_pruning.layers import LayerMask


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
