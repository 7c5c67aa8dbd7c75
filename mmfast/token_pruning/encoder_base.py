"""Methods that make the vision encoder itself run on fewer tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.bipartite_merge import average_groups
from mmfast.token_pruning.base import Merger, VisionSignal, check_choice
from mmfast.tokens import Layout, VisualTokens

GROUPS = "encoder_groups"
"""Signal ``[N]`` int64: visual tokens with the same number share one token of the vision encoder."""


@dataclass(frozen=True)
class EncoderTokens:
    """The tokens of ONE row of the vision encoder (an image, tile or frame) after one of its blocks.

    Attributes:
        hidden: ``[n, C]`` what the block gave.
        keys: ``[n, d]`` keys of its attention, averaged over the heads.
        sizes: ``[n]`` float32, how many patches each token stands for.
        grid: rows and columns of patches before anything was merged.
        class_token: whether the first token is the class token, which must stay the first and alone.
    """

    hidden: Tensor
    keys: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    class_token: bool


@dataclass(frozen=True)
class EncoderMerger(Merger):
    """Merge between the blocks of the vision encoder, or after it.

    Behind the encoder every patch gets back the feature of the token it was merged into, so that the rest of
    the model finds what it expects; before the language model one visual token per merged token is kept, the
    one nearest to the middle of its patches.

    Attributes:
        where: ``"encoder"`` merges between the blocks of the vision encoder, ``"output"`` merges the visual
            tokens the encoder gave; None takes the encoder where the model allows it.
    """

    where: Literal["encoder", "output"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, [None, "encoder", "output"])

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Inside the encoder, ask which visual tokens share a token."""
        return {GROUPS: VisionSignal("groups")} if self.where == "encoder" else {}

    @property
    def weighs(self) -> bool:
        """Whether attention to a token grows with the patches it stands for, by log(size) on the logits."""
        return False

    @abstractmethod
    def schedule(self, blocks: int, patches: int, kept: int) -> Mapping[int, int]:
        """Say how many patches are left at least after which block.

        Args:
            blocks: merging is possible after blocks ``0 .. blocks - 1``, at least one.
            patches: tokens of a row, without the class token.
            kept: how many are to be left in the end.

        Returns:
            Block -> patches left; descending, and nowhere below ``kept``.
        """

    @abstractmethod
    def merge_block(self, tokens: EncoderTokens, left: int) -> tuple[Tensor, Tensor]:
        """Merge tokens until ``left`` of them are left, the class token included, or more if the data say so.

        Returns:
            ``(places, source)``: int64 ``[m]`` inputs that the outputs stand at, and int64 ``[n]``, the output
            that each input goes into.
        """


def merge_rows(features: Tensor, sizes: Tensor, source: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average rows, weighing each by its size.

    Args:
        features: ``[n, C]``.
        sizes: float32 ``[n]``, positive.
        source: int64 ``[n]`` in ``0..count-1``, each of which occurs.
        count: number of outputs.

    Returns:
        ``[count, C]`` in the dtype of the input, and the summed sizes, float32 ``[count]``.

    Example:
        >>> features, sizes = torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([2.0, 1.0, 1.0])
        >>> merged, sizes = merge_rows(features, sizes, torch.tensor([0, 0, 1]), 2)
        >>> merged.tolist(), sizes.tolist()
        ([[2.0], [1.0]], [3.0, 1.0])
    """
    merged, total = average_groups(features[None], sizes[None], source[None], count)
    return merged[0], total[0]


def encoder_groups(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    """Read which visual tokens share a token of the vision encoder.

    Returns:
        ``(slots, source)``: int64 ``[G]`` the visual token nearest to the middle of each group, ascending, and
        int64 ``[N]`` the group of each visual token. Without the signal each token is a group of its own.

    Example:
        >>> tokens = VisualTokens(torch.ones(4, 2), Layout.grid(1, 4), signals={GROUPS: torch.tensor([7, 7, 7, 3])})
        >>> [part.tolist() for part in encoder_groups(tokens)]
        [[1, 3], [0, 0, 0, 1]]
    """
    groups = tokens.signals.get(GROUPS)
    if groups is None:
        alone = torch.arange(len(tokens), device=tokens.features.device)
        return alone, alone
    source = groups.unique(return_inverse=True)[1].to(tokens.features.device)
    # The numbers mean nothing: what follows must not depend on them.
    slots, order = central_members(tokens.layout, source).sort()
    return slots, order.argsort()[source]


def central_members(layout: Layout, source: Tensor) -> Tensor:
    """Find in each group the token nearest to the middle of the group; ties go to the earlier one.

    Args:
        layout: of N tokens.
        source: int64 ``[N]`` in ``0..G-1``, each of which occurs.

    Returns:
        int64 ``[G]``.

    Example:
        >>> central_members(Layout.grid(2, 3), torch.tensor([0, 0, 0, 1, 0, 0])).tolist()
        [1, 3]
    """
    place = torch.stack([layout.frame, layout.row, layout.col], dim=-1).to(source.device).float()
    count = int(source.max()) + 1
    middle, _ = merge_rows(place, torch.ones_like(place[:, 0]), source, count)
    distance = (place - middle[source]).square().sum(dim=-1)
    # By distance, then stably by group: the first of each group is the nearest.
    nearest = distance.sort(stable=True).indices
    ordered = nearest[source[nearest].sort(stable=True).indices]
    starts = torch.bincount(source, minlength=count).cumsum(0).roll(1)
    starts[0] = 0
    return ordered[starts]
