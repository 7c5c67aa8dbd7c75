"""Progressive pooling: one frame in several in full, those that follow it coarser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.registry import register
from mmfast.token_pruning.base import Merger
from mmfast.token_pruning.before_llm.free_video_llm import averaged, grid_of, placed
from mmfast.token_pruning.before_llm.pool2d import pooled_grid
from mmfast.token_pruning.video import fit_counts
from mmfast.tokens import Keep, VisualTokens


@register("progressive_pooling", stage="before_llm", paper="arXiv 2409.20018")
@dataclass(frozen=True)
class ProgressivePooling(Merger):
    """Leave the first frame of each group as it is, and average squares of tokens in the others.

    A budget other than the paper's count makes the squares of all frames but the first ones smaller or larger, and
    where that is not enough, those of the first ones too. What a grid leaves over of the budget goes to evenly spaced
    tokens as they are. The other half of the paper, a wider context by scaled rotary frequencies, is not part of this.

    Paper: "Visual Context Window Extension: A New Perspective for Long Video Understanding".

    Attributes:
        keep: what survives; None is the paper's count: whole first frames, squares of the others.
        group: frames of a group; the paper does not settle on a number.
        stride: side of the squares, in tokens.
    """

    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    group: int = 4
    stride: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int of at least 1")

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the tokens of the first frames, and the squares of the others."""
        groups = tokens.layout.tiles()
        return sum(own_counts([grid_of(tokens.layout, group) for group in groups], self.group, self.stride))

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Pool frame by frame."""
        groups = tokens.layout.tiles()
        grids = [grid_of(tokens.layout, group) for group in groups]
        counts = fit_counts(
            own_counts(grids, self.group, self.stride), [height * width for height, width in grids], kept
        )
        device = tokens.features.device
        parts, shown = [], []
        for group, grid, count in zip(groups, grids, counts, strict=True):
            if count:
                shown.append(group)
                frame = tokens.features[group.to(device)].reshape(*grid, -1)
                parts.append(averaged(frame, *pooled_grid(*grid, count)))
        return placed(tokens, parts, shown, kept)


def own_counts(grids: list[tuple[int, int]], group: int, stride: int) -> list[int]:
    """Say how many tokens each frame keeps: all of the first of each group, one per square of the others.

    Args:
        grids: rows and columns of each frame.
        group: frames of a group.
        stride: side of the squares.

    Example:
        >>> own_counts([(4, 6)] * 3, 2, 2), own_counts([(3, 3)] * 2, 2, 2)
        ([24, 6, 24], [9, 4])
    """
    coarse = [-(-height // stride) * -(-width // stride) for height, width in grids]
    return [
        height * width if frame % group == 0 else squares
        for frame, ((height, width), squares) in enumerate(zip(grids, coarse, strict=True))
    ]
