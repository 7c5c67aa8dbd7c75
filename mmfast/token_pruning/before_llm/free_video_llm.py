"""Free Video-LLM: a few frames in detail where the question points, all of them coarsely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, pad

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, check_choice
from mmfast.token_pruning.before_llm.cdpruner import clip_embeddings
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.frame_base import best_frames
from mmfast.tokens import Keep, Layout, VisualTokens


class Pooled(NamedTuple):
    """Tokens made of the grid of one frame.

    Attributes:
        features: ``[n, D]``.
        places: int64 ``[n]``, ascending, a place in the grid for each.
        sizes: float32 ``[n]``, how many tokens of the grid each is made of.
    """

    features: Tensor
    places: Tensor
    sizes: Tensor


@register(
    "free_video_llm", stage="before_llm", paper="arXiv 2410.10441", source="contrastive/FreeVideoLLM", vectors=True
)
@dataclass(frozen=True)
class FreeVideoLLM(Merger):
    """Show the frames that fit the question and some evenly spaced ones in detail, and all frames coarsely.

    Detail is a rectangle around what fits the question, its tokens joined in pairs by their maximum. Every token stands
    at its own place in the video; where two want one place, the later moves on. A budget below the paper's count takes
    evenly spaced ones of these tokens, a larger one adds evenly spaced tokens as they are.

    In the official code a frame that fits the question and is also an evenly spaced one is shown twice, tokens come
    path by path, and the map of pairs is read as twice as wide and half as high as it is, so that the rectangle is none
    in the image (``compat="official"``).

    Paper: "Free Video-LLM: Prompt-guided Visual Perception for Efficient Training-free Video LLMs".

    Attributes:
        keep: what survives; None is the paper's count: the rectangles and the coarse frames.
        slow: frames in detail that fit the question best.
        middle: frames in detail that are evenly spaced.
        region: share of a frame that the rectangle covers.
        fast: frames shown coarsely; the best for the question, where there are more.
        rows, columns: size of a coarse frame.
        relevance: ``"llm"`` compares features with the prompt's text; ``"clip"`` patches with the question in the
            space of a CLIP model passed to :func:`mmfast.accelerate`, as in the paper.
        compat: ``"official"`` takes over what the official code does differently.
    """

    needs = frozenset({"text_embeds"})
    reads_question = True
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    slow: int = 3
    middle: int = 5
    region: float = 0.8
    fast: int = 50
    rows: int = 4
    columns: int = 4
    relevance: Literal["llm", "clip"] = "llm"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ["llm", "clip"])
        check_choice("compat", self.compat, [None, "official"])
        for name in ("slow", "middle", "fast", "rows", "columns"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int of at least 1")
        if isinstance(self.region, bool) or not isinstance(self.region, int | float) or not 0 < self.region <= 1:
            raise ValueError(f"region={self.region!r} must lie in (0, 1]")

    @property
    def wants_clip(self) -> bool:
        """Whether signals of a CLIP model are needed."""
        return self.relevance == "clip"

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the rectangles and the coarse frames."""
        return sum(part.places.numel() for part in self._paths(tokens)[0])

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Pool frame by frame, and find every token a place."""
        return placed(tokens, *self._paths(tokens), kept, in_order=self.compat == "official")

    def _paths(self, tokens: VisualTokens) -> tuple[list[Pooled], list[Tensor]]:
        """Return the pooled tokens of each path and frame, and the places of the frame they came from."""
        groups = tokens.layout.tiles()
        if self.relevance == "clip":
            patches, text = clip_embeddings(tokens)
        else:
            patches, text = tokens.features, tokens.signals["text_embeds"]
        # No text fits nothing in particular.
        question = text.float().sum(dim=0) / max(1, len(text))
        device = tokens.features.device
        grids = [grid_of(tokens.layout, group) for group in groups]
        own = [tokens.features[group.to(device)].unflatten(0, grid) for group, grid in zip(groups, grids, strict=True)]
        seen = [patches[group.to(device)].unflatten(0, grid) for group, grid in zip(groups, grids, strict=True)]
        frames = torch.stack([patch.float().mean(dim=(0, 1)) for patch in seen])
        official = self.compat == "official"
        detailed, coarse = frames_of_paths(frames, question, (self.slow, self.middle, self.fast), official=official)
        parts = [cropped_pairs(own[t], seen[t], question, self.region, official=official) for t in detailed]
        parts += [averaged(own[t], self.rows, self.columns) for t in coarse]
        return parts, [groups[t] for t in (*detailed, *coarse)]


def placed(
    tokens: VisualTokens, parts: Sequence[Pooled], groups: Sequence[Tensor], kept: int, *, in_order: bool = False
) -> Keep:
    """Find a place for every pooled token, and make up the count.

    Where two tokens want one place, the later moves on. Of too many tokens evenly spaced ones stay; where some are
    missing, evenly spaced tokens are added as they are.

    Args:
        tokens: what was pooled.
        parts: of each frame or tile, the pooled tokens; a frame may occur more than once.
        groups: int64 places of the frame or tile of each part.
        kept: tokens to keep.
        in_order: leave the features in the order of the parts, whatever their places.

    Example:
        >>> tokens = VisualTokens.from_features(torch.arange(4.0)[:, None])
        >>> part = averaged(tokens.features[None], 1, 1)
        >>> kept = placed(tokens, [part], [torch.arange(4)], 2)
        >>> kept.indices.tolist(), kept.features.flatten().tolist()
        ([1, 2], [1.5, 2.0])
    """
    device, total = tokens.features.device, len(tokens)
    features = torch.cat([part.features for part in parts])
    sizes = torch.cat([part.sizes for part in parts]).to(device)
    wanted = torch.cat([group[part.places] for part, group in zip(parts, groups, strict=True)])
    if kept > len(wanted):
        free = torch.ones(total, dtype=torch.bool)
        free[wanted] = False
        rest = free.nonzero().squeeze(-1)
        rest = rest[uniform_subset(rest.numel(), kept - len(wanted))]
        features = torch.cat([features, tokens.features[rest.to(device)]])
        sizes = torch.cat([sizes, sizes.new_ones(rest.numel())])
        wanted = torch.cat([wanted, rest])
    slots, order = wanted.sort(stable=True)
    chosen = uniform_subset(len(wanted), kept)
    order = (chosen if in_order else order[chosen]).to(device)
    return Keep(distinct(slots[chosen], total).to(device), features[order], sizes[order])


def grid_of(layout: Layout, places: Tensor) -> tuple[int, int]:
    """Return rows and columns of the tokens of one frame or tile; one row where they fill no grid.

    Example:
        >>> grid_of(Layout.grid(2, 3), torch.arange(6)), grid_of(Layout.unknown(5), torch.arange(5))
        ((2, 3), (1, 5))
    """
    row, col = layout.row[places], layout.col[places]
    height, width = int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1
    filled = height * width == places.numel() and bool((row >= 0).all()) and bool((col >= 0).all())
    return (height, width) if filled else (1, places.numel())


def frames_of_paths(
    frames: Tensor, question: Tensor, counts: tuple[int, int, int], *, official: bool = False
) -> tuple[list[int], list[int]]:
    """Choose the frames that are shown in detail, and those that are shown coarsely.

    Args:
        frames: ``[T, E]`` one embedding per frame.
        question: ``[E]``.
        counts: frames in detail that fit the question, that are evenly spaced, and coarse ones.
        official: those that fit the question first, then the evenly spaced ones; else each once, in order.

    Returns:
        Numbers of the frames in detail and of the coarse ones.

    Example:
        >>> frames_of_paths(torch.eye(4), torch.tensor([0.0, 0.0, 0.0, 1.0]), (1, 2, 9))
        ([0, 2, 3], [0, 1, 2, 3])
    """
    slow, middle, fast = counts
    score = cosine_similarity(frames.double(), question.double(), dim=-1, eps=1e-12)
    fitting = best_frames(score, min(slow, len(frames))).tolist()
    spaced = torch.linspace(0, len(frames), middle + 1, dtype=torch.float64)[:-1].long().tolist()
    detailed = [*fitting, *spaced] if official else sorted({*fitting, *spaced})
    return detailed, best_frames(score, min(fast, len(frames))).tolist()


def cropped_pairs(
    features: Tensor, patches: Tensor, question: Tensor, share: float, *, official: bool = False
) -> Pooled:
    """Join neighbours in a row by their maximum, and cut out a rectangle around those that fit a question.

    Args:
        features: ``[h, w, D]`` of one frame.
        patches: ``[h, w, E]`` to compare with the question.
        question: ``[E]``.
        share: of the pairs, that decide where the rectangle lies, and that it covers.
        official: read the map of pairs, ``[h, w / 2]``, as ``[w / 2, h]``.

    Example:
        >>> features = torch.arange(8.0).view(2, 4, 1)
        >>> cropped_pairs(features, features, torch.ones(1), 0.25).features.tolist()
        [[1.0]]
    """
    height, width = features.shape[0], -(-features.shape[1] // 2)
    pooled, seen = paired(features).flatten(0, 1), paired(patches).flatten(0, 1)
    starts = (torch.arange(height)[:, None] * features.shape[1] + 2 * torch.arange(width)).flatten()
    if official:
        height, width = width, height
    score = cosine_similarity(seen.double(), question.double(), dim=-1, eps=1e-12)
    best = best_frames(score, max(1, int(height * width * share))).cpu()
    high, wide = (min(size, max(1, round(size * share**0.5))) for size in (height, width))
    top = min(max(int((best // width).double().mean()) - high // 2, 0), height - high)
    left = min(max(int((best % width).double().mean()) - wide // 2, 0), width - wide)
    inside = (torch.arange(top, top + high)[:, None] * width + torch.arange(left, left + wide)).flatten()
    places = starts[inside]
    alone = (places % features.shape[1] + 1 == features.shape[1]).float()
    return Pooled(pooled[inside.to(pooled.device)], places, 2.0 - alone)


def paired(grid: Tensor) -> Tensor:
    """Take the maximum of neighbours in a row; the last of an odd row stays alone.

    Args:
        grid: ``[h, w, C]``.

    Returns:
        ``[h, ceil(w / 2), C]``.

    Example:
        >>> paired(torch.tensor([[[1.0], [3.0], [2.0]]])).flatten().tolist()
        [3.0, 2.0]
    """
    even = pad(grid, (0, 0, 0, grid.shape[1] % 2), value=-torch.inf)
    return rearrange(even, "h (w pair) c -> h w pair c", pair=2).amax(dim=2)


def averaged(features: Tensor, rows: int, columns: int) -> Pooled:
    """Average a frame down to a smaller grid, or to its own where that is smaller.

    Args:
        features: ``[h, w, D]``.
        rows: rows of the grid.
        columns: columns of the grid.

    Example:
        >>> averaged(torch.arange(4.0).view(2, 2, 1), 1, 2).features.tolist()
        [[1.0], [2.0]]
    """
    height, width = features.shape[:2]
    rows, columns = min(rows, height), min(columns, width)
    pooled = adaptive_avg_pool2d(rearrange(features.float(), "h w d -> d h w"), (rows, columns))
    (top, tall), (left, broad) = _bins(height, rows), _bins(width, columns)
    places = (top + (tall - 1) // 2)[:, None] * width + left + (broad - 1) // 2
    sizes = (tall[:, None] * broad).float()
    return Pooled(rearrange(pooled, "d h w -> (h w) d").to(features.dtype), places.flatten(), sizes.flatten())


def _bins(size: int, bins: int) -> tuple[Tensor, Tensor]:
    """Return begin and length of each bin, as average pooling cuts them."""
    index = torch.arange(bins)
    begin = index * size // bins
    return begin, -((index + 1) * -size // bins) - begin


def distinct(wanted: Tensor, total: int) -> Tensor:
    """Move slots on, where several want one, so that they ascend; back, where the end is reached.

    Args:
        wanted: int64 ``[K]``, ascending but for repetitions.
        total: number of slots, at least K.

    Example:
        >>> distinct(torch.tensor([0, 2, 2, 2, 4]), 5).tolist(), distinct(torch.tensor([0, 0, 3]), 9).tolist()
        ([0, 1, 2, 3, 4], [0, 1, 3])
    """
    steps = torch.arange(wanted.numel())
    onward = (wanted - steps).cummax(dim=0).values + steps
    return torch.minimum(onward, total - wanted.numel() + steps)
