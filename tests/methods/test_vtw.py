"""VTW: where the visual tokens go, and that they go altogether."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.token_pruning.in_llm.vtw import VTW
from support.inside import layer_tokens


@pytest.mark.parametrize(
    ("options", "total", "depth", "first"),
    [
        ({"keep": 15 / 32}, 576, 32, 15),
        ({"keep": 0.5}, 576, 40, 20),
        ({"keep": 64}, 576, 32, 4),
        ({"keep": 1}, 576, 32, 1),
        ({"keep": 1.0}, 576, 32, 32),
        ({"keep": 900}, 576, 32, 32),
        ({"layer": 20}, 576, 40, 20),
        ({"layer": 0.5, "keep": 0.1}, 576, 32, 16),
    ],
)
def test_tokens_are_there_up_to_a_layer_and_gone_from_it_on(
    options: dict[str, float], total: int, depth: int, first: int
) -> None:
    method = VTW(**options)
    assert method.keep_counts(total, 10, depth) == [total + 10] * first + [10] * (depth - first)
    dropping = [event.layer for event in method.events(depth) if method.drops(event, (total,))]
    assert dropping == [first] * (first < depth)


@given(keep=st.floats(0.01, 1.0), total=st.integers(1, 600), depth=st.integers(2, 40))
def test_keep_is_the_average_over_the_layers(keep: float, total: int, depth: int) -> None:
    counts = VTW(keep=keep).keep_counts(total, 0, depth)
    # Whole layers only, and the first one always reads everything.
    assert abs(sum(counts) / (total * depth) - max(keep, 1 / depth)) <= 0.5 / depth + 1e-9


def test_a_count_is_one_per_image() -> None:
    assert VTW(keep=8).counts(32, 8, images=2) == VTW(keep=0.5).counts(32, 8)


def test_all_go_at_once() -> None:
    method = VTW(layer=2)
    tokens = layer_tokens(6, [1, 2, 3])
    first, second, third = method.events(4)
    assert method(tokens, first) is None
    assert method(tokens, second).indices.tolist() == []
    assert method(layer_tokens(3, [], media_totals=[3]), third) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "keep=0 must be at least 1"), ({"tolerance": -1.0}, "tolerance=-1.0 must be at least 0")],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VTW(**options)


def test_a_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer=9 means layer 9, which must lie in 1\.\.7"):
        VTW(layer=9).events(8)
