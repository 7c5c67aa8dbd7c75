"""MustDrop's vision stage: average windows of alike patches early in the encoder, keep what it looks at late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.encoder_base import EncoderMerger, EncoderTokens, encoder_groups, merge_rows
from mmfast.token_pruning.similarity import highest_first, merged_keep, normalised
from mmfast.tokens import Keep, Layout, VisualTokens


@register("mustdrop_vision", stage="before_llm", paper="arXiv 2411.10803", source="liuting20/MustDrop", vectors=True)
@dataclass(frozen=True)
class MustDropVision(EncoderMerger):
    """Merge windows of similar patches, then drop the tokens the class token attends to least.

    A window is merged where its patches are on average as similar as ``threshold``; of too many such windows
    the most similar ones are. What is left above ``keep`` is dropped by the class attention of the encoder's
    last block, so the key set of the paper, the tokens of highest attention there, goes last. The paper's
    later stages are the method ``mustdrop``.

    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024.

    Attributes:
        where: ``"encoder"`` merges after the first block, so that all later blocks run on fewer tokens;
            ``"output"`` merges windows of visual tokens; None takes the encoder where the model allows.
        window: side of a window; patches that fill no whole window are not merged.
        threshold: least mean cosine similarity between the patches of a window, in [-1, 1].
    """

    needs = frozenset({"cls_attention"})

    scope: Literal["global", "per_tile"] = "per_tile"
    window: int = 3
    threshold: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window={self.window!r} must be an int of at least 2: the side of a window in patches")
        if isinstance(self.threshold, bool) or not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must lie in [-1, 1]: a mean cosine similarity")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the last block."""
        return {**super().vision_signals(), "cls_attention": VisionSignal("cls_attention", layer="last")}

    def schedule(self, blocks: int, patches: int, kept: int) -> Mapping[int, int]:
        """Merge after the first block."""
        return {0: kept}

    def merge_block(self, tokens: EncoderTokens, left: int) -> tuple[Tensor, Tensor]:
        """Merge windows of similar patches, as long as ``left`` tokens are left."""
        first = int(tokens.class_token)
        height, width = tokens.grid
        layout = Layout.grid(height, width)
        places, source = self._windows(tokens.hidden[first:], layout, left - first)
        if not first:
            return places, source
        zero = places.new_zeros(1)
        return torch.cat([zero, places + 1]), torch.cat([zero, source + 1])

    def _windows(self, features: Tensor, layout: Layout, left: int) -> tuple[Tensor, Tensor]:
        members = whole_windows(layout, self.window).to(features.device)
        similarity = window_similarity(features, members)
        most = (features.shape[0] - left) // (self.window**2 - 1)
        merged = min(int((similarity >= self.threshold).sum()), max(0, most))
        return merge_windows(features.shape[0], members, similarity, merged)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Merge windows unless the encoder did, and keep the tokens of highest attention."""
        slots, group = encoder_groups(tokens)
        attention = tokens.signals["cls_attention"].float()
        features = tokens.features
        sizes = torch.bincount(group, minlength=slots.numel()).float()
        if self.where != "encoder":
            slots, group = self._windows(features, tokens.layout, kept)
            features, sizes = merge_rows(features, sizes, group, slots.numel())
            attention, _ = merge_rows(attention[:, None], torch.ones_like(attention), group, slots.numel())
            attention = attention[:, 0]
        else:
            features, attention = features[slots], attention[slots]
        chosen = highest_first(attention, kept)
        number = torch.full_like(slots, -1)
        number[chosen] = torch.arange(kept, device=slots.device)
        return merged_keep(slots[chosen], features[chosen], sizes[chosen], number[group])


def whole_windows(layout: Layout, window: int) -> Tensor:
    """List the windows of ``window x window`` tokens that are complete, tile by tile.

    Args:
        layout: of N tokens; those without a place in a grid belong to no window.
        window: side of a window.

    Returns:
        int64 ``[W, window * window]`` on the CPU, members in raster order.

    Example:
        >>> whole_windows(Layout.grid(2, 5), 2).tolist()
        [[0, 1, 5, 6], [2, 3, 7, 8]]
    """
    found = []
    for places in layout.tiles():
        row, col = layout.row[places], layout.col[places]
        inside = (row >= 0) & (col >= 0)
        places, row, col = places[inside], row[inside], col[inside]
        if not places.numel():
            continue
        down, across = (row - row.min()) // window, (col - col.min()) // window
        number = down * (int(across.max()) + 1) + across
        order = number.sort(stable=True).indices
        whole = torch.bincount(number)[number[order]] == window**2
        found.append(places[order[whole]].reshape(-1, window**2))
    return torch.cat(found) if found else torch.empty(0, window**2, dtype=torch.int64)


def window_similarity(features: Tensor, members: Tensor) -> Tensor:
    """Average the cosine similarities between the tokens of each window.

    Args:
        features: ``[N, C]``.
        members: int64 ``[W, m]``.

    Returns:
        float32 ``[W]``.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> window_similarity(features, torch.tensor([[0, 1], [0, 2]])).tolist()
        [1.0, 0.0]
    """
    unit = normalised(features)[members]
    count = members.shape[1]
    similarity = unit @ unit.transpose(1, 2)
    alone = similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (similarity.sum(dim=(1, 2)) - alone) / (count * (count - 1))


def merge_windows(total: int, members: Tensor, similarity: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Merge the ``merged`` most similar windows.

    Args:
        total: number of tokens N.
        members: int64 ``[W, m]``.
        similarity: ``[W]``.
        merged: how many windows to merge.

    Returns:
        int64 ``[K]`` tokens that the outputs stand at, first the merged windows by descending similarity (at
        their middle), then the other tokens in their order; and int64 ``[N]``, the output each token goes into.

    Example:
        >>> places, source = merge_windows(5, torch.tensor([[0, 1], [3, 4]]), torch.tensor([0.5, 0.9]), 1)
        >>> places.tolist(), source.tolist()
        ([3, 0, 1, 2], [1, 2, 3, 0, 0])
    """
    joined = members[highest_first(similarity, merged)]
    source = torch.full((total,), -1, dtype=torch.int64, device=members.device)
    source[joined] = torch.arange(merged, device=members.device)[:, None]
    rest = (source < 0).nonzero().squeeze(-1)
    source[rest] = torch.arange(merged, merged + rest.numel(), device=members.device)
    return torch.cat([joined[:, (joined.shape[1] - 1) // 2], rest]), source
