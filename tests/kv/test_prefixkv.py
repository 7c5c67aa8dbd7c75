"""PrefixKV: budgets over the layers, measured or given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.prefixkv import PrefixKV, prefix_search, spread


class Given(PrefixKV):
    """With attention that is given in the first channel of the keys."""

    def scores(self, entries: Entries) -> torch.Tensor:
        return entries.keys[0, :, 0]


def layers(scores: torch.Tensor) -> list[Entries]:
    return [
        Entries.of(row[None, :, None], row[None, :, None], layer=i, depth=len(scores)) for i, row in enumerate(scores)
    ]


def counts(method: PrefixKV, scores: torch.Tensor) -> list[int]:
    settled = method.settle([method.observe(entries) for entries in layers(scores)])
    return [scores.shape[1] if layer is None else layer.counts[0] for layer in settled]


def test_layers_that_look_everywhere_keep_more() -> None:
    few = torch.full((60,), 0.01)
    few[20:24] = 5.0
    kept = counts(Given(keep=20), torch.stack([few, torch.ones(60)]))
    assert kept[0] < 10 < 30 < kept[1]
    assert sum(kept) in (40, 41)


def test_equal_scores_end_the_search() -> None:
    assert counts(Given(keep=20), torch.ones(5, 60)) == [20] * 5
    assert counts(Given(keep=0.5), torch.zeros(5, 60)) == [30] * 5


def test_one_entry_with_everything_ends_the_search() -> None:
    scores = torch.zeros(3, 40)
    scores[:, 7] = 1.0
    assert counts(Given(keep=10), scores) == [10, 10, 10]


@settings(max_examples=60, deadline=None)
@given(
    some.integers(2, 40),
    some.integers(1, 5),
    some.floats(0.0, 6.0),
    some.one_of(some.integers(1, 40), some.floats(0.01, 1.0)),
    some.integers(0, 5),
)
def test_average_is_kept(length: int, depth: int, sharpness: float, keep: int | float, start: int) -> None:
    scores = torch.randn(depth, length, generator=torch.Generator().manual_seed(length)) * sharpness
    method = Given(keep=keep, start=start)
    kept = counts(method, scores.softmax(dim=-1))
    assert min(kept) >= 1
    wanted = method.keep_count(length)
    assert wanted <= sum(kept) / depth < wanted + (1 if isinstance(keep, int) else 2)


def test_first_and_last_entries_stay() -> None:
    scores = torch.arange(30.0).flip(0).repeat(2, 1)
    scores[:, :3] = 0.0
    method = Given(keep=10, start=3)
    for layer in method.settle([method.observe(entries) for entries in layers(scores)]):
        assert isinstance(layer, Retained)
        assert layer.kept[[0, 1, 2, 29]].all()


def test_layers_of_different_lengths() -> None:
    """Layers behind one that dropped tokens are shorter."""
    observed = []
    for layer, length in enumerate((50, 50, 20, 20)):
        row = torch.rand(length, generator=torch.Generator().manual_seed(layer))
        method = Given(keep=0.5)
        observed.append(method.observe(Entries.of(row[None, :, None], row[None, :, None], layer=layer, depth=4)))
    kept = [layer.counts[0] for layer in method.settle(observed) if layer is not None]
    assert 70 <= sum(kept) < 74


def test_profile_decides_alone() -> None:
    method = Given(keep=0.9, ratios=(0.0, 0.5, 0.95))
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    # 0.95 of 30 is 28.5, which rounds to the even neighbour.
    assert counts(method, scores) == [30, 15, 2]
    assert method.keep_count(30) == 16
    with pytest.raises(ValueError, match="ratios has 3 numbers, but the model has 2 layers"):
        method.observe(layers(scores[:2])[0])


def test_profile_of_one_layer_decides_by_itself() -> None:
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    assert Given(ratios=(0.0, 0.5, 0.95)).retain(layers(scores)[1], 3).counts == [15]


def test_steps_follow_the_profile() -> None:
    method, prompt = Given(ratios=(0.5, 0.2), distance=-3), layers(torch.rand(2, 20))
    method.settle([method.observe(entries) for entries in prompt])
    stored = [10, 16]
    gone: list[list[int]] = [[], []]
    for added in range(1, 11):
        for layer, entries in enumerate(prompt):
            now = torch.zeros(1, stored[layer] + 1, 1)
            mask = method.step(Step(now, now, now[:, :1], 20 + added, added, layer, 2, memory=entries.memory))
            stored[layer] += mask is None
            gone[layer] += [] if mask is None else (~mask).nonzero().flatten().tolist()
    assert gone == [[7] * 5, [13] * 2]
    assert stored == [15, 24]


def test_search_stops_near_the_target() -> None:
    rows = list(torch.rand(4, 50, generator=torch.Generator().manual_seed(1)))
    for target in (20, 100, 150):
        assert abs(sum(prefix_search(rows, target, 2)) - target) < 5


def test_what_a_layer_cannot_drop_others_do() -> None:
    assert spread([10, 0, 0], 20, [10, 10, 10]) == [10, 5, 5]
    assert spread([0, 0], 0, [3, 3]) == [0, 0]


@pytest.mark.parametrize("ratios", [(), (0.5, 1.0), (-0.1,)])
def test_refuses_ratios(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ratios="):
        PrefixKV(ratios=ratios)
