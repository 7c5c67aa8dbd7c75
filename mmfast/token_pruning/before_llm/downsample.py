"""Downsampling: the baseline that shows the vision encoder a smaller picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmfast.registry import register
from mmfast.token_pruning.base import Merger, VisionSignal
from mmfast.token_pruning.before_llm.pool2d import pooled_grid
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.encoder_base import GROUPS, encoder_groups
from mmfast.tokens import Keep, VisualTokens


@register("downsample", stage="before_llm")
@dataclass(frozen=True)
class Downsample(Merger):
    """Shrink every picture before the vision encoder, so that it gives fewer tokens.

    The picture is resized to the largest grid of about its aspect ratio with at most the wanted number of
    tokens, so the count can be lower than ``keep``. Frames share the budget equally; where there are more
    frames than tokens to keep, evenly spread ones survive. Each token takes the slot, and with
    ``positions="keep"`` the position, nearest to the middle of what it shows of the full picture.
    """

    fits_grid = True

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask which visual tokens show the same token of the smaller picture."""
        return {GROUPS: VisionSignal("groups")}

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Keep one visual token for each token of the smaller picture."""
        slots, source = encoder_groups(tokens)
        sizes = torch.bincount(source, minlength=slots.numel()).float()
        if slots.numel() > kept:
            chosen = uniform_subset(slots.numel(), kept).to(slots.device)
            number = torch.full_like(slots, -1)
            number[chosen] = torch.arange(kept, device=slots.device)
            slots, sizes, source = slots[chosen], sizes[chosen], number[source]
        return Keep(slots, tokens.features[slots], sizes, source)


def smaller_grid(rows: int, cols: int, share: int) -> tuple[int, int]:
    """Return the grid of tokens a picture is resized to.

    Args:
        rows: rows of tokens of the full picture.
        cols: its columns.
        share: most tokens the smaller one may give; at least 1.

    Example:
        >>> smaller_grid(24, 24, 64), smaller_grid(4, 4, 20)
        ((8, 8), (4, 4))
    """
    return pooled_grid(rows, cols, min(share, rows * cols))
