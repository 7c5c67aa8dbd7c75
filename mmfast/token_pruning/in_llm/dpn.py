"""DPN: a router looks at the question and chooses how much the map of visual tokens is pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.budget import truncated_count
from mmfast.registry import register
from mmfast.token_pruning.layers import LayerEvent, LayerTokens, Schedule
from mmfast.token_pruning.weights import Lesson, check_path, prepared, taught
from mmfast.tokens import Keep

STRIDES: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 2))
"""The experts: by how many rows and columns each pools."""

HINGE_WEIGHT = 0.001
"""Factor of :func:`hinge_loss` beside the loss of the answer."""


@register(
    "dpn", stage="in_llm", paper="arXiv 2503.20322", source="aihao2000/DPN-LLaVA", vectors=True, training_free=False
)
@dataclass(frozen=True)
class DynamicPyramid(Schedule):
    """Max-pool the visual maps before several layers, by the stride that a router chooses.

    The router reads the last prompt token; each map, also at stride (1, 1), is multiplied by the
    probability of the choice, and a pooled token takes the slot of the first token of its cell. Odd
    sides lose their last row or column. All images, tiles and frames of a prompt are pooled alike. The
    count depends on the shape of the maps, so it cannot be told from the number of tokens. The official
    router reads a special token at the end of the question, and positions are renumbered
    (``positions="compact"``). Without ``weights`` the routers are random, their probabilities all close
    to one third (mechanics only).

    In training strides are drawn (:func:`draw_expert`) and pushed to be coarse (:func:`hinge_loss`); with ``keep`` they
    are those of use, and nothing pushes.

    Weights, for each step i, hidden size D and d = D // 4: ``routers.<i>.norm.weight`` and ``.bias``
    ``[D]``, ``routers.<i>.reduce.weight`` ``[d, D]``, ``routers.<i>.choose.weight`` ``[3, d]``.

    Paper: "Dynamic Pyramid Network for Efficient Multimodal Large Language Model".

    Attributes:
        keep: None lets the router choose. Else what a layer reads on average (int = count per image): each
            step takes the stride that leaves least, but no less than the schedule solved for ``keep``.
        layers: layers before which the maps are pooled.
        fractions: what is left after each step of the schedule that another ``keep`` scales.
        smallest: the router's choice spares maps of fewer tokens.
        weights: path of a safetensors file with the trained routers; empty = untrained.
    """

    adaptive: ClassVar[bool] = True
    merges = True

    keep: int | float | None = None
    smallest: int = 16
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.smallest, bool) or not isinstance(self.smallest, int) or self.smallest < 1:
            raise ValueError(f"smallest={self.smallest!r} must be an int of at least 1: a number of tokens")
        check_path(self.weights)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer of the schedule; none where everything is kept."""
        return [] if isinstance(self.keep, float) and self.keep == 1.0 else super().events(depth)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Leave it to the data: the shape of the maps and the router decide."""
        return None if self.events(depth) else []

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        """Pool the maps by one stride and weigh them by its probability."""
        everything = torch.arange(tokens.candidates.numel(), device=tokens.hidden.device)
        maps = visual_maps(tokens)
        if self.keep is None:
            maps = [item for item in maps if item[1] * item[2] >= self.smallest]
        fraction = self.solved(tokens.total, event.depth, len(tokens.media_totals))[event.step]
        if not maps or fraction >= 1.0:
            return everything
        state = tokens.hidden[tokens.last_token]
        steps = len(self.steps(event.depth))
        probability = prepared(self, DpnRouters, (state.numel(), steps), state.device)(state, event.step)
        sizes = [sum(_cells(height, width, stride) for _, height, width in maps) for stride in STRIDES]
        if self.keep is None:
            drawn = tokens.lesson is not None and tokens.lesson.noise
            expert = draw_expert(probability, sizes) if drawn else int(probability.argmax())
            if tokens.lesson is not None:
                tokens.lesson.note("stride", (event.step, probability))
        else:
            target = truncated_count(max(fraction, 1e-9), tokens.total)
            expert = min(range(len(sizes)), key=lambda index: (sizes[index] < target, sizes[index]))
        return _pooled(tokens, maps, STRIDES[expert], probability[expert])

    def learned(self, width: int, depth: int, device: torch.device) -> DpnRouters:
        """Return the routers."""
        return taught(self, DpnRouters, (width, len(self.steps(depth))), device)

    def training_loss(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Push towards coarser pooling, step by step."""
        found = lesson.noted("stride")
        if not found:
            return {"hinge": torch.zeros(())}
        rows, steps = torch.stack([row for _, row in found]), torch.tensor([step for step, _ in found])
        return {"hinge": HINGE_WEIGHT * hinge_loss(rows, steps.to(rows.device))}


class DpnRouters(nn.Module):
    """One router per step, as the paper initialises them (Kaiming-uniform, temperature 10).

    Args:
        width: hidden size D.
        steps: number of steps.

    Example:
        >>> round(DpnRouters(8, 3)(torch.randn(8), 2).sum().item(), 5)
        1.0
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.routers = nn.ModuleList(_Router(width) for _ in range(steps))

    def forward(self, state: Tensor, step: int) -> Tensor:
        """Return the probability of each stride, float32 ``[..., 3]``, for router states ``[..., D]``."""
        probability: Tensor = self.routers[step](state)
        return probability


class _Router(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 4)
        self.norm = nn.LayerNorm(width)
        self.reduce = nn.Linear(width, inner, bias=False)
        self.choose = nn.Linear(inner, len(STRIDES), bias=False)

    def forward(self, state: Tensor, temperature: float = 10.0) -> Tensor:
        inner = functional.gelu(self.reduce(self.norm(state.to(self.norm.weight.dtype))))
        logits: Tensor = self.choose(inner)
        return (logits.float() / temperature).softmax(dim=-1)


def visual_maps(tokens: LayerTokens) -> list[tuple[Tensor, int, int]]:
    """Find the maps that the candidates make up, one per frame or tile, also after pooling.

    The crops of an image that is cut up lie on one map, as their rows and columns do.

    Returns:
        Per map its places among the candidates in raster order, int64 on the CPU, its rows and columns.

    Raises:
        ValueError: if where the tokens lie is not known, or they are no full grids any more.

    Example:
        >>> from mmfast.tokens import Layout
        >>> four = torch.arange(4)
        >>> layouts = (Layout.grid(2, 2),)
        >>> tokens = LayerTokens(torch.zeros(4, 8), four, four, four * 0, 4, (4,), layouts=layouts)
        >>> [(places.tolist(), height, width) for places, height, width in visual_maps(tokens)]
        [([0, 1, 2, 3], 2, 2)]
    """
    origin, media = tokens.origin.cpu(), tokens.media.cpu()
    maps, before = [], 0
    for index, total in enumerate(tokens.media_totals):
        own = (media == index).nonzero().squeeze(-1)
        layout = tokens.layouts[index] if index < len(tokens.layouts) else None
        if layout is None or not layout.grid_known:
            raise ValueError(
                "dpn needs to know the grid of the visual tokens, which this model's adapter cannot give for these "
                "inputs; pass pixel values instead of precomputed features, or use a method that drops"
            )
        layout = layout.take(origin[own] - before)
        before += total
        keys = torch.stack([layout.frame, layout.tile], dim=-1)
        for key in keys.unique(dim=0):
            group = (keys == key).all(dim=-1).nonzero().squeeze(-1)
            rows, columns = layout.row[group], layout.col[group]
            height, width = rows.unique().numel(), columns.unique().numel()
            if height * width != group.numel():
                raise ValueError(
                    f"dpn needs full grids, but {group.numel()} tokens lie on {height} rows and {width} columns; do "
                    "not combine it with a method that drops tokens before the language model"
                )
            raster = (rows * (columns.max() + 1) + columns).argsort()
            maps.append((own[group[raster]], height, width))
    return maps


def pool_map(states: Tensor, height: int, width: int, stride: tuple[int, int]) -> Tensor:
    """Max-pool a map; sides shorter than the stride become 1, and what is left over at the end goes.

    Args:
        states: ``[height * width, D]`` in raster order.
        height: rows.
        width: columns.
        stride: rows and columns that become one.

    Returns:
        ``[h * w, D]`` in raster order, same dtype.

    Example:
        >>> pool_map(torch.arange(6.0)[:, None], 2, 3, (2, 2)).tolist()
        [[4.0]]
    """
    grid = rearrange(states, "(h w) d -> d h w", h=height)
    size = (min(stride[0], height), min(stride[1], width))
    return rearrange(functional.max_pool2d(grid[None], size)[0], "d h w -> (h w) d")


def draw_expert(probability: Tensor, cells: Sequence[int], least: int = 18) -> int:
    """Draw a stride in training, never one that leaves fewer than ``least`` tokens unless all do.

    Args:
        probability: ``[3]``.
        cells: how many tokens each stride leaves.
        least: the fewest that may be left.

    Example:
        >>> draw_expert(torch.tensor([0.2, 0.4, 0.4]), [24, 12, 6])
        0
    """
    allowed = torch.tensor([left >= least for left in cells], device=probability.device)
    if not bool(allowed.any()):
        return 0
    # Drawing again until the result is allowed is drawing among those allowed.
    return int((probability.detach() * allowed).multinomial(1))


def hinge_loss(
    probability: Tensor,
    layer: Tensor,
    scope: Literal["per_layer", "global"] = "per_layer",
    *,
    scales: Sequence[float] = (0.0, 1.0, 2.0),
    target: float = 1.5,
) -> Tensor:
    """Push towards coarser pooling until the weighted scale of the choices reaches a target.

    The scale of a choice e is ``scales[e] * p_e``, with e the most likely one. The paper bounds its mean
    layer by layer; the official code shares one list over the layers (``scope="global"``).

    Args:
        probability: ``[R, 3]`` of all samples and layers.
        layer: ``[R]`` int64, the layer (or step) of each row.
        scope: mean of the hinges of the layers, or the hinge of the mean.
        scales: scale of each stride.
        target: where the push ends.

    Returns:
        A scalar, to be weighed by :data:`HINGE_WEIGHT`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> hinge_loss(rows, torch.tensor([0, 1])).item(), hinge_loss(rows, torch.tensor([0, 1]), "global").item()
        (0.75, 0.5)
    """
    best, expert = probability.float().max(dim=-1)
    reached = best * torch.tensor(list(scales), device=best.device)[expert]
    groups = [reached] if scope == "global" else [reached[layer == one] for one in layer.unique()]
    return torch.stack([(target - group.mean()).clamp_min(0.0) for group in groups]).mean()


def _cells(height: int, width: int, stride: tuple[int, int]) -> int:
    return (height // min(stride[0], height)) * (width // min(stride[1], width))


def _pooled(
    tokens: LayerTokens, maps: list[tuple[Tensor, int, int]], stride: tuple[int, int], probability: Tensor
) -> Keep:
    states = tokens.hidden[tokens.candidates]
    stays = torch.ones(states.shape[0], dtype=torch.bool)
    features = torch.full_like(states, float("nan"))
    for places, height, width in maps:
        rows, columns = min(stride[0], height), min(stride[1], width)
        grid = rearrange(places, "(h w) -> h w", h=height)
        first = grid[: height // rows * rows : rows, : width // columns * columns : columns].reshape(-1)
        stays[places] = False
        stays[first] = True
        pooled = pool_map(states[places.to(states.device)], height, width, stride)
        features[first.to(states.device)] = (pooled * probability).to(states.dtype)
    kept = stays.nonzero().squeeze(-1).to(states.device)
    return Keep(kept, features[kept])
