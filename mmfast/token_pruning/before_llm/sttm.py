"""STTM: a quadtree per frame where the picture is even, and a chain over frames where it stands still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, check_choice
from mmfast.token_pruning.before_llm.prunevid import check_threshold
from mmfast.token_pruning.similarity import (
    chain_heads,
    halvings,
    highest_first,
    merged_keep,
    normalised,
    segment_sums,
)
from mmfast.tokens import Keep, Layout, VisualTokens

_SEARCH = 12
"""Steps in which the thresholds for a given count are searched."""


@register("sttm", stage="before_llm", paper="arXiv 2507.07990", source="HYUNJS/STTM", vectors=True)
@dataclass(frozen=True)
class STTM(Merger):
    """Cover each frame with few large blocks where it is even, and join blocks that stay the same over time.

    From the root of a quadtree down, a block stays whole if all its quarters resemble it. Blocks of
    consecutive frames one of which contains the other are joined if they are alike. A joined token is the mean of
    its blocks, at the top left place of its first block.

    With ``keep=None`` the thresholds decide how many are left; the paper's 50 % and 30 % are about
    ``threshold=0.85`` and 0.8. With a ``keep`` both thresholds are raised or lowered together until just about as
    many are left, and the last few too many are joined in pairs of the most similar ones.

    A single image is one frame, so that only its own blocks are joined. Tiles are trees of their own; tokens
    whose place is not known are left as they are, and only joined with the next.

    Paper: "Multi-Granular Spatio-Temporal Token Merging for Training-Free Acceleration of Video LLMs", ICCV 2025.

    Attributes:
        threshold: least similarity of a block and its quarters, in [-1, 1].
        temporal: least similarity of blocks of consecutive frames, in [-1, 1]; None joins none.
        root_level: where the trees begin; 0 are blocks of which two make up a side, 1 those of half the size.
        weighted: weigh blocks and tokens by the patches they cover.
        compat: ``"official"`` also compares the blocks at the border of a map of an odd side with the first block
            of the frame, and joins chains over time only as far as the rounds of the code reach.
    """

    adaptive = True

    keep: int | float | None = None
    threshold: float = 0.85
    temporal: float | None = 0.6
    root_level: int = 1
    weighted: bool = False
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        check_threshold("threshold", self.threshold)
        if self.temporal is not None:
            check_threshold("temporal", self.temporal)
        if isinstance(self.root_level, bool) or not isinstance(self.root_level, int) or self.root_level < 0:
            raise ValueError(f"root_level={self.root_level!r} must be an int of at least 0")

    def own_count(self, tokens: VisualTokens) -> int:
        """Count what the thresholds leave."""
        return sum(len(clip.blocks(0.0)) for clip in self.clips(tokens))

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Build the trees, join over time, and fit the count."""
        clips = self.clips(tokens)
        found = [clip.blocks(0.0) for clip in clips]
        if sum(map(len, found)) != kept:
            found = self._search(clips, kept)
        device = tokens.features.device
        source = torch.empty(len(tokens), dtype=torch.int64, device=device)
        before = 0
        for clip, blocks in zip(clips, found, strict=True):
            source[clip.places.flatten()] = blocks.owner.flatten() + before
            before += len(blocks)
        slots = torch.cat([clip.places.flatten()[own.first] for clip, own in zip(clips, found, strict=True)])
        features = torch.cat([clip.features(own) for clip, own in zip(clips, found, strict=True)])
        sizes = torch.bincount(source, minlength=before).float()
        features, sizes, stay, joined = join_neighbours(features, sizes, kept)
        slots, source = slots[stay], joined[source]
        return merged_keep(slots, features.to(tokens.features.dtype), sizes, source)

    def clips(self, tokens: VisualTokens) -> list[Clip]:
        """Cut the tokens into maps that follow each other in time."""
        return [
            Clip(tokens.features, places.to(tokens.features.device), self) for places in grids_over_time(tokens.layout)
        ]

    def _search(self, clips: list[Clip], kept: int) -> list[Blocks]:
        """Find the lowest thresholds that leave at least ``kept``."""
        low, high = -1.0, 1.0
        best = [clip.blocks(high) for clip in clips]
        for _ in range(_SEARCH):
            shift = (low + high) / 2
            found = [clip.blocks(shift) for clip in clips]
            if sum(map(len, found)) >= kept:
                best, high = found, shift
            else:
                low = shift
        return best


def shifted(threshold: float, shift: float) -> float:
    """Move a threshold towards just above 1 for a shift of 1, and just below -1 for a shift of -1.

    Example:
        >>> shifted(0.5, 0.0), shifted(0.5, 1.0) > 1.0, shifted(0.5, -1.0) < -1.0
        (0.5, True, True)
    """
    return threshold + shift * (1.001 - threshold if shift > 0 else 1.001 + threshold)


def grids_over_time(layout: Layout) -> Iterator[Tensor]:
    """Cut a layout into maps of one size that follow each other in time.

    Returns:
        int64 ``[T, h, w]`` places of the tokens of each; what fills no map, such as class tokens and tokens whose
        place is not known, comes as maps of a single row and frame.

    Example:
        >>> [places.shape for places in grids_over_time(Layout.grid(2, 3, frames=4))]
        [torch.Size([4, 2, 3])]
        >>> [places.shape for places in grids_over_time(Layout.unknown(5))]
        [torch.Size([1, 1, 5])]
    """
    crop = torch.full_like(layout.tile, -1) if layout.crop is None else layout.crop
    outside = (layout.row < 0) | (layout.col < 0)
    keys = torch.stack([layout.tile, crop, outside.long()], dim=-1)
    for key in keys.unique(dim=0):
        mine = (keys == key).all(dim=-1)
        run: list[Tensor] = []
        for frame in layout.frame[mine].unique():
            places = _grid(layout, (mine & (layout.frame == frame)).nonzero().squeeze(-1))
            if run and (places.shape[0] == 1 or places.shape != run[-1].shape):
                yield torch.stack(run)
                run = []
            run.append(places)
        yield torch.stack(run)


def _grid(layout: Layout, places: Tensor) -> Tensor:
    """Shape the tokens of one map ``[h, w]``; ``[1, n]`` where they fill none."""
    rows, cols = layout.row[places], layout.col[places]
    width = int(cols.max() - cols.min()) + 1
    raster = (rows - rows.min()) * width + cols - cols.min()
    full = bool((raster == torch.arange(places.numel())).all()) and places.numel() % width == 0
    return places.view(-1, width) if full else places[None]


@dataclass(frozen=True)
class Blocks:
    """How one clip is cut.

    Attributes:
        nodes: int64 ``[L]``, the blocks, numbered over all levels.
        group: int64 ``[L]``, which chain of blocks each belongs to, in ``0..K-1`` in the order of the first tokens.
        first: int64 ``[K]``, top left token of the first block of each chain.
        owner: int64 ``[T, h, w]``, the chain of each token.
        boxes: int64 ``[K, 5]``: frame, top, left, bottom and right of the first block, the latter two exclusive.
    """

    nodes: Tensor
    group: Tensor
    first: Tensor
    owner: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return int(self.first.numel())


class Clip:
    """Maps of one size that follow each other in time, with their trees.

    Args:
        features: ``[N, D]`` of all tokens.
        places: int64 ``[T, h, w]``, the tokens of this clip.
        method: the thresholds.

    Example:
        >>> features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 12)
        >>> clip = Clip(features, torch.arange(16).view(1, 4, 4).permute(0, 2, 1), STTM(root_level=0))
        >>> len(clip.blocks(0.0)), len(clip.blocks(1.0)), clip.blocks(0.0).boxes[2].tolist()
        (10, 16, [0, 0, 2, 2, 4])
    """

    def __init__(self, features: Tensor, places: Tensor, method: STTM) -> None:
        self.places = places
        self.method = method
        self._compared: dict[tuple[int, int], Tensor] = {}
        self.levels = self._levels(features)
        self.norms = [level.norm(dim=-1).clamp_min(1e-12) for level in self.levels]
        counts = torch.tensor([norm.numel() for norm in self.norms])
        self.offsets: list[int] = (counts.cumsum(0) - counts).tolist()

    def blocks(self, shift: float) -> Blocks:
        """Cut and join with both thresholds moved as :func:`shifted` says."""
        method = self.method
        leaf = self._leaves(shifted(method.threshold, shift))
        nodes, owner = leaf.flatten().unique(return_inverse=True)
        cells = torch.arange(leaf.numel(), device=leaf.device)
        first = torch.full_like(nodes, leaf.numel()).scatter_reduce_(0, owner, cells, "amin")
        last = torch.zeros_like(nodes).scatter_reduce_(0, owner, cells, "amax")
        first, order = first.sort()
        nodes, last, owner = nodes[order], last[order], order.argsort()[owner]
        group = torch.arange(nodes.numel(), device=leaf.device)
        if method.temporal is not None and self.places.shape[0] > 1:
            alike = self._likeness(leaf) >= shifted(method.temporal, shift)
            own = owner.view(self.places.shape)
            head = chain_heads(own[:-1][alike], own[1:][alike], nodes.numel(), closure=method.compat is None)
            heads, group = head.unique(return_inverse=True)
            first, last = first[heads], last[heads]
        area, width = self.places[0].numel(), self.places.shape[2]
        boxes = torch.stack(
            [first // area, first % area // width, first % width, last % area // width + 1, last % width + 1], dim=-1
        )
        return Blocks(nodes, group, first, group[owner].view(self.places.shape), boxes)

    def features(self, blocks: Blocks) -> Tensor:
        """Average the blocks of each chain, float32 ``[K, D]``."""
        weight = self._cover[blocks.nodes] if self.method.weighted else torch.ones_like(blocks.nodes)
        own = torch.cat([level.flatten(0, 2) for level in self.levels])[blocks.nodes]
        total = torch.bincount(blocks.group, weight, minlength=len(blocks)).float()
        return segment_sums(own * weight[:, None], blocks.group, len(blocks)) / total[:, None]

    # ------------------------------------------------------------------------ the tree

    def _levels(self, features: Tensor) -> list[Tensor]:
        """Return float32 ``[T, h, w, D]`` features of the blocks of each level, the largest blocks first."""
        height, width = self.places.shape[1:]
        halvings_left = 0
        while height > 2 and width > 2:
            height, width = (height + 1) // 2, (width + 1) // 2
            halvings_left += 1
        levels = [features[self.places].float()]
        cover = torch.ones_like(levels[0][..., :1])
        for _ in range(halvings_left - min(self.method.root_level, halvings_left)):
            weight = cover if self.method.weighted else torch.ones_like(cover)
            total = halved_sum(weight)
            levels.insert(0, halved_sum(levels[0] * weight) / total)
            cover = halved_sum(cover)
        return levels

    @cached_property
    def _cover(self) -> Tensor:
        """Number of tokens each block of all levels covers, ``[nodes]``."""
        return torch.cat([torch.bincount(level.flatten() - level.min()) for level in self._ancestors])

    @cached_property
    def _ancestors(self) -> list[Tensor]:
        """Per level, the block in which each token lies, numbered over all levels, ``[T, h, w]``."""
        frame = torch.arange(self.places.shape[0], device=self.places.device)[:, None, None]
        found = []
        for level, offset in enumerate(self.offsets):
            height, width = self.norms[level].shape[1:]
            rows, cols = self._within(len(self.levels) - 1, level)
            found.append(offset + (frame * height + rows[:, None]) * width + cols)
        return found

    def _within(self, fine: int, coarse: int) -> tuple[Tensor, Tensor]:
        """Return, for each row and each column of a level, the one of a coarser level it lies in."""
        sides = []
        for axis in (1, 2):
            place = torch.arange(self.norms[fine].shape[axis], device=self.places.device)
            for level in range(fine, coarse, -1):
                place = (place + self.norms[level].shape[axis] % 2) // 2
            sides.append(place)
        return sides[0], sides[1]

    def _cosines(self, fine: int, coarse: int, shift: int) -> Tensor:
        """Compare blocks with those of a coarser level (or the same) that contain them.

        Args:
            fine: level of the former.
            coarse: level of the latter.
            shift: the latter are taken so many frames later.

        Returns:
            float32 ``[T, h, w]`` of the finer level; frames without a partner are left out.
        """
        rows, cols = self._within(fine, coarse)
        frames = [frame for frame in range(len(self.places)) if 0 <= frame + shift < len(self.places)]
        # One frame after the other: all of the partners at once would be as many features as there are.
        return torch.stack(
            [
                torch.linalg.vecdot(self.levels[fine][frame], self.levels[coarse][frame + shift][rows][:, cols])
                / (self.norms[fine][frame] * self.norms[coarse][frame + shift][rows][:, cols])
                for frame in frames
            ]
        )

    @cached_property
    def _evenness(self) -> list[Tensor]:
        """Per level but the last, the least similarity of a block and its quarters, ``[T, h, w]``."""
        found = []
        for level in range(len(self.levels) - 1):
            alike = self._cosines(level + 1, level, 0)
            up, left = alike.shape[1] % 2, alike.shape[2] % 2
            quarters = pad(alike, (left, 0, up, 0), value=torch.inf)
            quarters = rearrange(quarters, "t (h a) (w b) -> t h w (a b)", a=2, b=2)
            if self.method.compat == "official":
                corner = self.levels[level + 1][:, :1, :1]
                scale = self.norms[level] * self.norms[level + 1][:, :1, :1]
                beyond = torch.linalg.vecdot(self.levels[level], corner) / scale
                quarters = torch.where(quarters.isinf(), beyond[..., None], quarters)
            found.append(quarters.amin(dim=-1))
        return found

    def _leaves(self, threshold: float) -> Tensor:
        """Return the block each token ends up in, ``[T, h, w]``."""
        leaf = self._ancestors[-1]
        # From small blocks to large ones: the largest that is even has the last word.
        for level in reversed(range(len(self._evenness))):
            blocks = self._ancestors[level]
            even = self._evenness[level].flatten()[blocks - self.offsets[level]] >= threshold
            leaf = torch.where(even, blocks, leaf)
        return leaf

    # ------------------------------------------------------------------------ over time

    def _likeness(self, leaf: Tensor) -> Tensor:
        """Compare, at each place, the block of a frame with that of the next, float32 ``[T - 1, h, w]``."""
        level = torch.bucketize(leaf, torch.tensor(self.offsets, device=leaf.device), right=True) - 1
        found = torch.empty(leaf[1:].shape, device=leaf.device)
        for pair in torch.stack([level[:-1], level[1:]]).flatten(1).unique(dim=1).T.tolist():
            before, after = pair
            here = (level[:-1] == before) & (level[1:] == after)
            fine = max(before, after)
            # The finer block decides which pair it is; its own frame is the earlier or the later one.
            own = (leaf[:-1] if before >= after else leaf[1:])[here] - self.offsets[fine]
            own = own if before >= after else own - self.norms[fine][0].numel()
            found[here] = self._over_time(before, after).flatten()[own]
        return found

    def _over_time(self, before: int, after: int) -> Tensor:
        """Compare all blocks of a level with those of the next frame, and remember it for the next threshold."""
        if (before, after) not in self._compared:
            fine, coarse = max(before, after), min(before, after)
            self._compared[before, after] = self._cosines(fine, coarse, 1 if before >= after else -1)
        return self._compared[before, after]


def join_neighbours(features: Tensor, sizes: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join tokens with the next one, the most similar pairs first, until ``kept`` are left.

    Each round makes disjoint pairs and joins at most all of them.

    Args:
        features: float32 ``[n, D]``.
        sizes: float32 ``[n]``, what each counts in a mean.
        kept: how many are to be left, from 1 to n.

    Returns:
        ``[kept, D]`` means and ``[kept]`` sizes, int64 ``[kept]`` the first token of each, and int64 ``[n]`` what each
        token went into.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
        >>> [part.tolist() for part in join_neighbours(features, torch.ones(4), 3)]
        [[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [1.0, 1.0, 2.0], [0, 1, 2], [0, 1, 2, 2]]
    """
    places = source = torch.arange(features.shape[0], device=features.device)
    for merges in halvings(features.shape[0], kept):
        paired = features.shape[0] // 2 * 2
        alike = (normalised(features[0:paired:2]) * normalised(features[1:paired:2])).sum(dim=-1)
        left = 2 * highest_first(alike, merges)
        weights = sizes[left][:, None], sizes[left + 1][:, None]
        features = features.clone()
        features[left] = (features[left] * weights[0] + features[left + 1] * weights[1]) / (weights[0] + weights[1])
        sizes = sizes.index_add(0, left, sizes[left + 1])
        stays = torch.ones_like(places, dtype=torch.bool)
        stays[left + 1] = False
        source = (stays.long().cumsum(dim=0) - 1)[source]
        features, sizes, places = features[stays], sizes[stays], places[stays]
    return features, sizes, places, source


def halved_sum(maps: Tensor) -> Tensor:
    """Add up blocks of 2 x 2; where a side is odd, its first row or column is a block of its own.

    Args:
        maps: ``[T, h, w, D]``.

    Returns:
        ``[T, ceil(h/2), ceil(w/2), D]``.

    Example:
        >>> halved_sum(torch.ones(1, 3, 4, 1)).flatten().tolist()
        [2.0, 2.0, 4.0, 4.0]
    """
    padded = pad(maps, (0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2, 0))
    return rearrange(padded, "t (h a) (w b) d -> t h a w b d", a=2, b=2).sum(dim=(2, 4))
