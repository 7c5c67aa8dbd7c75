"""FrameFusion: what merges, what drops, and what the layers read in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.in_llm.framefusion import place_of, sparsity_due
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Layout
from support.attention import DenseAttention

DEPTH = 20


def prompt(
    states: Tensor, row: Tensor, layouts: tuple[Layout, ...], origin: Tensor | None = None, **more: Any
) -> LayerTokens:
    """Visual tokens and one word, whose attention is ``row``."""
    alive = len(states)
    totals = tuple(len(layout) for layout in layouts)
    origin = torch.arange(alive) if origin is None else origin
    weights = torch.zeros(1, alive + 1, alive + 1)
    weights[0, -1, :alive] = row
    media = torch.repeat_interleave(torch.arange(len(totals)), torch.tensor(totals))[origin]
    return LayerTokens(
        hidden=torch.cat([states, torch.zeros(1, states.shape[1])]),
        candidates=torch.arange(alive),
        origin=origin,
        media=media,
        total=sum(totals),
        media_totals=totals,
        layouts=layouts,
        attention=DenseAttention.of(weights),
        **more,
    )


def test_similar_tokens_merge_before_any_is_dropped() -> None:
    # Three frames of two places: the second place stays for three frames, the first turns round.
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 6.0]])
    row = torch.tensor([0.5, 0.0, 0.1, 0.0, 0.2, 0.0])
    tokens = prompt(states, row, (Layout.grid(1, 2, frames=3),))
    method = get("framefusion").method(keep=4)
    keep = method(tokens, method.events(DEPTH)[0])
    assert keep.indices.tolist() == [0, 1, 2, 4]
    assert keep.features[1].tolist() == [0.0, 3.0]
    assert keep.features[[0, 2, 3]].isnan().all()
    fewer = get("framefusion").method(keep=2)
    assert fewer(tokens, fewer.events(DEPTH)[0]).indices.tolist() == [0, 4]
    # Only as many as need be, the most alike first.
    more = get("framefusion").method(keep=5)
    assert len(more(tokens, more.events(DEPTH)[0])) == 5


def test_an_image_has_nothing_to_merge_with() -> None:
    row = torch.tensor([0.1, 0.4, 0.2, 0.3])
    layouts = (Layout.grid(1, 2), Layout.grid(1, 2))
    method = get("framefusion").method(keep=1)
    keep = method(prompt(torch.ones(4, 2), row, layouts), method.events(DEPTH)[0])
    assert keep.indices.tolist() == [1, 3]
    assert keep.features is None


def test_places_of_tiles_and_unknown_layouts_are_all_different() -> None:
    tokens = prompt(torch.ones(4, 2), torch.ones(4), (Layout.unknown(4),))
    assert place_of(tokens).unique().numel() == 4
    plain = Layout.grid(1, 2, frames=2)
    tiles = Layout("image", plain.tile, plain.frame, plain.row, plain.col, plain.is_newline)
    assert place_of(prompt(torch.ones(4, 2), torch.ones(4), (tiles,))).unique().numel() == 4
    assert place_of(prompt(torch.ones(4, 2), torch.ones(4), (plain,))).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("cost", [0.2, 0.45])
def test_layers_read_the_cost_on_average(noise: float, cost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = Layout.grid(4, 4, frames=40, modality="video")
    states = (torch.randn(16, 32, generator=generator) + noise * torch.randn(40, 16, 32, generator=generator)).flatten(
        0, 1
    )
    method = get("framefusion").method(cost=cost)
    memory: dict[str, Any] = {}
    origin, read = torch.arange(640), []
    for event in method.events(DEPTH):
        row = torch.rand(len(states), generator=generator)
        keep = method(prompt(states, row, (layout,), origin, memory=memory), event)
        if keep is not None:
            states, origin = states[keep.indices], origin[keep.indices]
        read.append(len(states))
    assert memory["done"]
    assert sum(read) / DEPTH / 640 == pytest.approx(cost, abs=0.005)


def test_what_can_no_longer_be_met_takes_all() -> None:
    assert sparsity_due([0.0, 0.0], 0.1, 10) == 1.0
    assert sparsity_due([0.9], 0.5, 10) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": 0.0}, r"cost=0.0 must lie in \(0, 1\]"),
        ({"threshold": -2.0}, "threshold=-2.0 must be a cosine similarity"),
        ({"least": 1.1}, r"least=1.1 must lie in \[0, 1\]"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("framefusion").method(**options)
