"""ZipVL: probe rows, the smallest set that covers a mass, and counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast.token_pruning.in_llm.zipvl import ZipVL, covering_count, probe_rows
from mmfast.token_pruning.layers import LayerTokens
from support.attention import DenseAttention
from support.cases import one
from support.checks import first_logits
from support.families import FAMILIES
from support.inside import layer_tokens


def hand_made() -> LayerTokens:
    """Text, three visual tokens, text and text; the last two rows give .1 .1 .4 .1 .2 .1 on average."""
    weights = torch.eye(6).repeat(2, 1, 1)
    weights[0, 4:] = torch.tensor([[0.2, 0.0, 0.5, 0.0, 0.3, 0.0], [0.1, 0.1, 0.3, 0.1, 0.2, 0.2]])
    weights[1, 4:] = torch.tensor([[0.0, 0.2, 0.5, 0.2, 0.1, 0.0], [0.1, 0.1, 0.3, 0.1, 0.2, 0.2]])
    return layer_tokens(6, [1, 2, 3], attention=DenseAttention.of(weights))


@pytest.mark.parametrize(
    ("options", "selected"),
    [
        ({"mass": 0.3}, [1]),  # the text alone would do, but one token always takes part
        ({"mass": 0.75}, [1]),
        ({"mass": 0.85}, [0, 1]),
        ({"mass": 0.95}, [0, 1, 2]),
        ({"keep": 1}, [1]),
        ({"keep": 0.67}, [0, 1]),
        ({"keep": 1.0}, [0, 1, 2]),
        ({"keep": 9}, [0, 1, 2]),
    ],
)
def test_text_and_the_fewest_tokens_cover_the_mass(options: dict[str, float], selected: list[int]) -> None:
    method = ZipVL(recent=2, sampled=0, **options)
    assert method.route(hand_made(), 3, 8).selected.tolist() == selected


def test_rows_that_are_no_probes_do_not_count() -> None:
    # The visual tokens look at themselves alone: with their rows in, each gets a third of what it had not.
    route = ZipVL(recent=2, sampled=64, keep=1).route(hand_made(), 3, 8)
    assert route.selected.tolist() == [1]
    assert ZipVL(recent=2, sampled=64, mass=0.75).route(hand_made(), 3, 8).selected.tolist() == [0, 1]


@given(
    length=st.integers(1, 300),
    recent=st.integers(1, 80),
    sampled=st.integers(0, 80),
    seed=st.integers(0, 3),
    layer=st.integers(0, 40),
)
def test_probes_are_the_last_rows_and_a_sample_of_the_others(
    length: int, recent: int, sampled: int, seed: int, layer: int
) -> None:
    rows = probe_rows(length, recent, sampled, seed, layer)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.numel() == min(length, recent + sampled)
    assert rows[-min(recent, length) :].tolist() == list(range(max(0, length - recent), length))
    assert rows.equal(probe_rows(length, recent, sampled, seed, layer))


def test_layers_and_seeds_draw_other_rows() -> None:
    draws = [tuple(probe_rows(1000, 64, 64, seed, layer).tolist()) for seed in range(3) for layer in range(3)]
    assert len(set(draws)) == 9


@given(values=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), text=st.floats(0, 2), mass=st.floats(0.01, 0.99))
def test_the_count_is_the_smallest_that_covers(values: list[float], text: float, mass: float) -> None:
    found = covering_count(torch.tensor(values, dtype=torch.float64), sum(values) + text, mass)
    ordered = sorted(values, reverse=True)

    def missing(count: int) -> float:
        return sum(ordered[count:])

    allowed = (1 - mass) * (sum(values) + text)
    assert 1 <= found <= len(values)
    assert found == len(values) or missing(found) <= allowed + 1e-9
    assert found == 1 or missing(found - 1) >= allowed - 1e-9


def test_predicted_counts() -> None:
    assert ZipVL(keep=4).keep_counts(40, 7, 3, images=2) == [15, 15, 15]
    assert ZipVL(keep=0.25).keep_counts(40, 7, 3, images=2) == [17, 17, 17]
    assert ZipVL(keep=0.25).keep_counts(0, 7, 2) == [7, 7]
    assert ZipVL().keep_counts(40, 7, 3) is None


@pytest.mark.parametrize("options", [{"mass": 0.0}, {"mass": 1.5}, {"recent": 0}, {"sampled": -1}, {"keep": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ZipVL(**options)


def test_each_layer_of_a_model_takes_its_own_number() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    with mmfast.accelerate(model, "zipvl(mass=0.8)") as fast:
        first_logits(model, batch.inputs)
        (work,) = fast.report().work
    assert len({layer.attending for layer in work}) > 1
    # The others skip the attention of the layer, and nothing else.
    assert {layer.fed for layer in work} == {len(batch.ids[0])}
    assert all(layer.attending == layer.shown < layer.fed for layer in work)
