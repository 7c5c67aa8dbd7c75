"""TopV: costs, the transport, and the sample of what it would drop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.token_pruning import similarity
from mmfast.token_pruning.in_llm.topv import TopV, places_of, transport_contribution, transport_cost, with_sample
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from mmfast.tokens import Layout
from support.inside import layer_tokens

EVENT = LayerEvent(2, 0, 8)


def random_grid(height: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> LayerTokens:
    total = height * width
    hidden = torch.randn(total + 2, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return layer_tokens(
        total + 2, range(1, total + 1), hidden=hidden, normed=hidden * 0.5, layouts=(Layout.grid(height, width),)
    )


def test_costs_by_hand() -> None:
    """Three tokens side by side; the first two look alike, the third the opposite way."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    centres = torch.tensor([[0.0, 0.5], [0.5, 0.5], [1.0, 0.5]])
    cost = transport_cost(features, features, centres, torch.zeros(3, dtype=torch.int64))(slice(0, 3))
    near, far = 1 - math.exp(-2.0), 1 - math.exp(-8.0)
    side = 0.5 / math.sqrt(0.5)
    expected = torch.tensor(
        [
            [0 + 0 + side, 0 + near + side, 1 + far + side],
            [0 + near + 0, 0 + 0 + 0, 1 + near + 0],
            [1 + far + side, 1 + near + side, 0 + 0 + side],
        ]
    )
    torch.testing.assert_close(cost, expected, atol=1e-6, rtol=0)


def test_other_pictures_are_as_far_away_as_can_be() -> None:
    same, middle = torch.tensor([[0.0, 2.0], [0.0, 1.0]]), torch.full((2, 2), 0.5)
    cost = transport_cost(same, same, middle, torch.tensor([0, 1]))(slice(0, 2))
    assert cost.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_one_round_of_sinkhorn_by_hand() -> None:
    """Kernel 1, 1/2; 1/4, 1: the rows are scaled by 1/3 and 2/5, the columns then by 15/13 and 15/17."""
    costs = torch.tensor([[0.0, math.log(2)], [math.log(4), 0.0]])
    expected = [5 / 13 * 3 + 5 / 34 * (3 - math.log(2)), 3 / 26 * (3 - math.log(4)) + 6 / 17 * 3]
    assert transport_contribution(lambda part: costs[part], 2, 1, 1.0).tolist() == pytest.approx(expected)


def test_many_rounds_move_equal_masses() -> None:
    costs = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    # What is one cheaper everywhere contributes once more its mass.
    mass = transport_contribution(lambda part: costs[part], 6, 200, 0.3)
    cheaper = transport_contribution(lambda part: costs[part] - 1.0, 6, 200, 0.3)
    torch.testing.assert_close(cheaper - mass, torch.full((6,), 1 / 6))


def test_the_distance_from_the_centre_counts() -> None:
    """In a grid of equal tokens those at the border contribute least."""
    tokens = random_grid(5, 5, 0)
    tokens.hidden[:] = 1.0
    assert tokens.normed is not None
    tokens.normed[:] = 1.0
    kept = TopV(keep=9, recovered=0.0)(tokens, EVENT)
    assert kept is not None
    assert kept.indices.tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 3), limit=st.sampled_from([1, 50, 300]))
def test_blocks_do_not_change_the_result(height: int, width: int, seed: int, limit: int) -> None:
    tokens = random_grid(height, width, seed)
    centres, picture = places_of(tokens)
    own = tokens.hidden[tokens.candidates]
    cost = transport_cost(own, own.flip(dims=[1]), centres, picture)
    whole = transport_contribution(cost, len(own), 3, 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_BLOCK_ELEMENTS", limit)
        torch.testing.assert_close(transport_contribution(cost, len(own), 3, 0.1), whole)


@given(
    worth=st.lists(st.integers(0, 5), min_size=2, max_size=30),
    data=st.data(),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_the_best_stay_and_the_sample_is_of_the_others(worth: list[int], data: st.DataObject, share: float) -> None:
    kept = data.draw(st.integers(1, len(worth) - 1))
    found = with_sample(torch.tensor(worth, dtype=torch.float32), kept, share).tolist()
    assert found == sorted(set(found))
    assert len(found) == kept
    best = sorted(range(len(worth)), key=lambda place: (-worth[place], place))[
        : kept - min(round(share * kept), kept - 1)
    ]
    assert set(best) <= set(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_half_precision_and_extreme_scales_leave_the_count(dtype: torch.dtype, scale: float) -> None:
    tokens = random_grid(4, 6, 1, dtype)
    tokens.hidden.mul_(scale)
    for keep in (1, 5, 0.5, 23):
        kept = TopV(keep=keep)(tokens, EVENT)
        assert kept is not None
        assert len(kept) == (12 if keep == 0.5 else keep)


def test_places_of_several_media() -> None:
    """An image, a video of two frames, and a picture of which nothing is known."""
    layouts = (Layout.grid(1, 2), Layout.grid(1, 1, frames=2, modality="video"), Layout.unknown(2))
    tokens = layer_tokens(6, range(6), media_totals=[2, 2, 2], layouts=layouts)
    centres, picture = places_of(tokens)
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert picture.tolist() == [0, 0, 1, 2, 3, 3]
    assert places_of(layer_tokens(3, range(2)))[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_the_whole_image_and_its_crops_lie_on_each_other() -> None:
    """One token for the whole image, and two crops of one token each, side by side."""
    column = torch.tensor([0, 0, 1])
    tile, zeros = torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.int64)
    layout = Layout("image", zeros, tile, zeros, column, zeros.bool(), crop=torch.tensor([-1, 0, 1]), crop_grid=(1, 2))
    centres, picture = places_of(layer_tokens(4, range(3), layouts=(layout,)))
    assert centres.tolist() == [[0.5, 0.5], [0.25, 0.5], [0.75, 0.5]]
    assert picture.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"iterations": 0}, {"smoothness": 0.01}, {"recovered": 1.0}, {"keep": 0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TopV(**options)
