"""DyCoke's merging over time: of groups of four frames one stays whole, of the others what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import shares
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, check_choice
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.similarity import frame_places, highest_first, merged_keep
from mmfast.token_pruning.video import place_similarity, unrounded
from mmfast.tokens import Keep, VisualTokens

GROUP = 4
"""Frames of which one stays whole."""


@register("dycoke", stage="before_llm", paper="arXiv 2411.15024", source="KD-TAO/DyCoke", vectors=True)
@dataclass(frozen=True)
class DyCoke(Selector):
    """Keep every fourth frame, and of the others the tokens least similar to the same place of an earlier frame.

    Inside a group of four, frames two and four are compared with their predecessor and frame three with the first;
    the budget that the whole frames leave is split evenly over the others. Despite the name of this half of the
    method, nothing is merged. Where the budget does not reach that far, groups get longer, two times each, and their
    middle frame is compared with the first again; where not even the first frame can stay whole, as in an image, each
    frame gets its share, and the first keeps evenly spaced tokens. The paper's second half, which changes what is read
    of the cache at each decode step, is not part of it.

    The official code drops the last of an odd number of frames, keeps the third frame of the last group whole, keeps
    equally many tokens of each other frame (cut off), and hands those on by rising similarity
    (``compat="official"``).

    Paper: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025.

    Attributes:
        keep: what survives; the default is the paper's, where 0.7 of the tokens of three frames in four go.
        compat: ``"official"`` takes over frames, counts and order of the official code.
    """

    keep: int | float | None = 0.475
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose tokens, and hand them on in raster order or the official one."""
        if self.compat is None:
            return super().reduce(tokens, kept)
        order = self.select(tokens, kept)
        source = torch.full((len(tokens),), -1, dtype=torch.int64, device=order.device)
        source[order] = torch.arange(order.numel(), device=order.device)
        ones = torch.ones(order.numel(), device=order.device)
        return merged_keep(order, tokens.features[order], ones, source, raster=False)

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the tokens frame by frame, those of thinned frames by rising similarity."""
        frames = frame_places(tokens.layout)
        sizes = [places.numel() for places in frames]
        if self.compat == "official" and len(frames) > 1:
            references = official_references(len(frames))
            counts = official_counts(references, sizes, kept)
        else:
            group = group_length(sizes, kept)
            references = [reference(index, group) for index in range(len(frames))]
            counts = split_budget(references, sizes, kept)
        device, chosen = tokens.features.device, []
        for own, before, count in zip(frames, references, counts, strict=False):
            places = own.to(device)
            if before is None:
                # With count == n this is the whole frame.
                chosen.append(places[uniform_subset(places.numel(), count).to(device)])
            else:
                similarity = place_similarity(tokens.features, tokens.layout, own, frames[before])
                if self.compat is None:
                    similarity = unrounded(similarity)
                chosen.append(places[highest_first(-similarity, count)])
        return torch.cat(chosen)


def reference(frame: int, group: int = GROUP) -> int | None:
    """Say which frame a frame is compared with: it is a half, quarter, ... of the group before it.

    Args:
        frame: index of the frame.
        group: frames per group, a power of two.

    Returns:
        Index of the other frame; None for the first of a group, which stays whole.

    Example:
        >>> [reference(frame) for frame in range(6)], reference(4, 8)
        ([None, 0, 0, 2, None, 4], 0)
    """
    inside = frame % group
    return frame - (inside & -inside) if inside else None


def group_length(sizes: Sequence[int], kept: int) -> int:
    """Return the shortest groups whose first frames leave a token to each other frame; 4, 8, 16, ...

    Args:
        sizes: tokens of each frame.
        kept: the budget.

    Example:
        >>> group_length([10] * 8, 38), group_length([10] * 8, 22), group_length([10] * 8, 3)
        (4, 8, 8)
    """
    group = GROUP
    while group < len(sizes) and sum(sizes[::group]) + len(sizes) - len(sizes[::group]) > kept:
        group *= 2
    return group


def split_budget(references: Sequence[int | None], sizes: Sequence[int], kept: int) -> list[int]:
    """Say how many tokens each frame keeps, so that they add up.

    Args:
        references: which frame each is compared with, None where it is to stay whole.
        sizes: tokens of each frame.
        kept: the budget.

    Example:
        >>> split_budget([None, 0, 0], [10, 10, 10], 15), split_budget([None, 0, 0], [10, 10, 10], 6)
        ([10, 3, 2], [2, 2, 2])
    """
    whole = [size if before is None else 0 for before, size in zip(references, sizes, strict=True)]
    thinned = [size - own for size, own in zip(sizes, whole, strict=True)]
    if sum(whole) > kept:
        return shares(kept, sizes)
    return [own + share for own, share in zip(whole, shares(kept - sum(whole), thinned), strict=True)]


def official_references(frames: int) -> list[int | None]:
    """Say which frame each is compared with in the official code; an odd last frame is left out.

    Example:
        >>> official_references(9)
        [None, 0, 0, 2, None, 4, 4, 6]
        >>> official_references(8)
        [None, 0, 0, 2, None, 4, None, 6]
    """
    halves = [index for index in range(2, frames, GROUP) if index - 2 < frames - GROUP]
    return [
        index - 1 if index % 2 else (index - 2 if index in halves else None) for index in range(frames - frames % 2)
    ]


def official_counts(references: Sequence[int | None], sizes: Sequence[int], kept: int) -> list[int]:
    """Say how many tokens each frame keeps in the official code, for a budget that it can meet.

    Args:
        references: which frame each is compared with.
        sizes: tokens of each frame.
        kept: the budget; what cannot be split evenly is left over.

    Raises:
        ValueError: if the whole frames alone are more than the budget.

    Example:
        >>> official_counts([None, 0, None, 2], [10] * 4, 27)
        [10, 3, 10, 3]
    """
    whole = sum(size for before, size in zip(references, sizes, strict=False) if before is None)
    if whole > kept:
        raise ValueError(
            f"keep={kept} tokens is less than the {whole} of the frames that the official code keeps whole; "
            "keep more, or leave compat=None, which thins more frames"
        )
    each = (kept - whole) // max(1, sum(before is not None for before in references))
    return [size if before is None else min(size, each) for before, size in zip(references, sizes, strict=False)]
