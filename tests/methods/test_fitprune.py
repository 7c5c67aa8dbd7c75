"""FitPrune: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.budget import LanguageShape, prefill_flops
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.calibrating import Look
from mmfast.token_pruning.in_llm.fitprune import TABLES, FitPrune, fit_deletes, scores
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens

LLAVA_7B = LanguageShape(32, 4096, 11008, 32, 32, 128)


def prompt(visual: int = 6, words: int = 3, seed: int = 0) -> LayerTokens:
    generator = torch.Generator().manual_seed(seed)
    length = 2 + visual + words
    view = AttentionView(torch.randn(4, length, 6, generator=generator), torch.randn(2, length, 6, generator=generator))
    return layer_tokens(length, range(2, 2 + visual), attention=view)


# --------------------------------------------------------------------------------- the score


def test_the_largest_head_counts_for_each_entry() -> None:
    tokens = prompt()
    largest = tokens.view().rows(torch.arange(11)).amax(dim=0)
    own, cross = scores(tokens)
    torch.testing.assert_close(own, largest[2:8, 2:8].mean(dim=0))
    torch.testing.assert_close(cross, largest[8:, 2:8].sum(dim=0))
    torch.testing.assert_close(FitPrune().score(tokens, LayerEvent(1, 0, 4)), own * cross)


def test_many_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores(prompt(40, 9))
    monkeypatch.setattr("mmfast.token_pruning.attention._BLOCK_ELEMENTS", 4 * 51 * 3)
    for found, wanted in zip(scores(prompt(40, 9)), whole, strict=True):
        torch.testing.assert_close(found, wanted)


# -------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("reduction", TABLES)
def test_published_tables_are_followed_to_the_token(reduction: Any) -> None:
    table = [int(count) for count in TABLES[reduction].split()]
    counts = FitPrune(reduction=reduction).keep_counts(576, 0, 32)
    assert counts is not None
    assert len(table) == 32
    assert [counts[layer] - counts[layer + 1] for layer in range(31)] == table[:31]


@pytest.mark.parametrize("reduction", TABLES)
def test_tables_save_about_what_they_are_called(reduction: Any) -> None:
    """Published for prompts with text; of visual tokens alone it comes to a little more."""
    counts = FitPrune(reduction=reduction).keep_counts(576, 0, 32)
    assert counts is not None
    saved = 1 - prefill_flops(LLAVA_7B, counts) / prefill_flops(LLAVA_7B, [576] * 32)
    assert saved == pytest.approx(reduction / 100, abs=0.06)


@pytest.mark.parametrize("depth", [5, 28, 40])
def test_other_depths_follow_the_relative_depth(depth: int) -> None:
    published = FitPrune(reduction=60).keep_counts(57600, 0, 32)
    found = FitPrune(reduction=60).keep_counts(57600, 0, depth)
    assert published is not None
    assert found is not None
    for layer, count in enumerate(found):
        place = layer / depth * 32
        before, share = int(place), place - int(place)
        after = published[min(before + 1, 31)]
        assert count == pytest.approx(published[before] * (1 - share) + after * share, abs=100)


def test_a_table_of_ones_own_is_scaled_to_the_number_of_tokens() -> None:
    method = FitPrune(deletes=(2, 0, 1, 0), deletes_of=8)
    assert method.keep_counts(8, 5, 4) == [13, 11, 11, 10]
    assert method.keep_counts(80, 0, 4) == [80, 60, 60, 50]
    assert FitPrune(deletes=(8, 0), deletes_of=8).keep_counts(8, 0, 2) == [8, 1]


@settings(deadline=None)
@given(keep=st.floats(0.2, 1.0), reduction=st.sampled_from(list(TABLES)), depth=st.sampled_from([8, 28, 32]))
def test_keep_is_the_average_over_the_layers(keep: float, reduction: Any, depth: int) -> None:
    counts = FitPrune(keep=keep, reduction=reduction).keep_counts(5760, 0, depth)
    assert counts is not None
    assert sum(counts) / (5760 * depth) == pytest.approx(keep, abs=0.001)
    assert sorted(counts, reverse=True) == counts
    assert FitPrune(keep=round(keep * 576), reduction=reduction).counts(1152, depth, images=2) == FitPrune(
        keep=round(keep * 576) / 576, reduction=reduction
    ).counts(1152, depth)


def test_exactly_the_count_is_left() -> None:
    method, tokens = FitPrune(keep=0.5), prompt(16)
    for event in method.events(5):
        decision = method(tokens, event)
        assert (16 if decision is None else len(decision)) == (method.counts(16, 5) or [])[event.step]


# ------------------------------------------------------------------------------- calibration


def test_a_layer_deletes_what_both_sums_can_do_without() -> None:
    """Ordered by product; the criterion that allows less decides, and later layers know what is gone."""
    shape = LanguageShape(3, 8, 16, 1, 1, 8)
    own = torch.tensor([0.4, 0.1, 0.3, 0.2])
    cross = torch.tensor([0.1, 0.05, 0.75, 0.1])
    # In the order of the products 1, 3, 0, 2 the own sums lose .1 .3 .7, the cross sums .05 .15 .25. Of the two
    # tokens that are left after the first layer the lesser has 4/7 of the own sum.
    assert fit_deletes([(own, cross)] * 2, shape, 0.8) == [1, 1, 0]
    assert fit_deletes([(own, cross)] * 2, shape, 0.7) == [2, 0, 0]
    assert fit_deletes([(own, cross)] * 2, shape, 0.6) == [2, 1, 0]
    assert fit_deletes([(cross, own)] * 2, shape, 0.7) == [2, 0, 0]


@settings(deadline=None, max_examples=40)
@given(keep=st.floats(0.3, 0.95), layers=st.integers(2, 8), tokens=st.integers(2, 30), seed=st.integers(0, 9))
def test_a_fitted_table_saves_what_was_asked_for(keep: float, layers: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [
        (torch.rand(tokens, generator=generator), torch.rand(tokens, generator=generator)) for _ in range(layers - 1)
    ]
    shape = LanguageShape(layers, 32, 64, 4, 2, 8)
    found = fit_deletes(maps, shape, keep)
    assert len(found) == layers
    assert found[-1] == 0
    assert sum(found) < tokens
    counts = FitPrune(deletes=tuple(found), deletes_of=tokens).keep_counts(tokens, 0, layers)
    assert counts is not None
    least = prefill_flops(shape, [tokens] + [1] * (layers - 1))
    full = prefill_flops(shape, [tokens] * layers)
    assert prefill_flops(shape, counts) <= max(keep * full, least)


@dataclass
class GivenBench:
    """A bench that shows the same prompts at each layer."""

    shape: LanguageShape
    prompts: list[LayerTokens]

    def divergence(self, method: Method) -> float:
        raise AssertionError("nothing is compared")

    def watch(self, look: Look) -> None:
        for layer in range(1, self.shape.layers):
            for tokens in self.prompts:
                look(tokens, LayerEvent(layer, layer - 1, self.shape.layers))


def mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(dim=0)


def test_calibration_averages_prompts_of_the_most_frequent_size() -> None:
    shape = LanguageShape(4, 8, 16, 2, 2, 4)
    same = [prompt(9, seed=1), prompt(9, seed=2)]
    found = FitPrune(reduction=90, positions="keep").calibrated(GivenBench(shape, [prompt(5), *same]), 0.7)
    maps = [scores(tokens) for tokens in same]
    both = (mean([own for own, _ in maps]), mean([cross for _, cross in maps]))
    wanted = fit_deletes([both] * 3, shape, 0.7)
    assert found == FitPrune(reduction=90, positions="keep", deletes=tuple(wanted), deletes_of=9)
    assert sum(wanted) > 0


def test_calibration_needs_prompts_with_images_and_a_share() -> None:
    bench = GivenBench(LanguageShape(4, 8, 16, 2, 2, 4), [])
    with pytest.raises(ValueError, match="no visual tokens"):
        FitPrune().calibrated(bench, None)
    with pytest.raises(ValueError, match="keep=3 must be a fraction"):
        FitPrune().calibrated(bench, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 55}, "reduction=55 must be one of"),
        ({"deletes": (3, -1)}, "must be counts"),
        ({"deletes": (300, 300)}, "at most deletes_of=576"),
        ({"keep": 0.0}, "keep=0.0 must lie in"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FitPrune(), **options)
