"""The counter reproduces what papers publish: visual tokens only, multiply-accumulates, LLaVA-1.5-7B and NeXT-7B."""

from __future__ import annotations

import pytest

from mmfast.budget import LanguageShape
from mmfast.plan import Plan

LLAVA_7B = LanguageShape(32, 4096, 11008, 32, 32, 128)


@pytest.mark.parametrize(
    ("plan", "visual", "teraflops"),
    [
        ("full", 576, 3.817),
        ("fastv(layer=2, keep=0.5)", 576, 2.007),
        ("fastv(layer=2, keep=0.25)", 576, 1.118),
        # A tenth of 576, cut off: rounding, as the official code does, would keep 58.
        ("fastv(layer=2, keep=57)", 576, 0.585),
        ("fastv(layer=3, keep=0.5)", 576, 2.068),
        ("fastv(layer=5, keep=0.5)", 576, 2.188),
        ("pyramiddrop()", 576, 1.777),
        ("vtw(layer=15)", 576, 1.789),
        ("dart(keep=128, compat='official')", 576, 1.044),
        ("sparsevlm()", 576, 1.353),
        ("sparsevlm(schedule=(303, 110, 36))", 576, 0.954),
        ("sparsevlm(schedule=(238, 48, 26))", 576, 0.749),
        ("sparsevlm(schedule=(66, 30, 17))", 576, 0.541),
        ("himap()", 576, 0.943),
        ("p_mod()", 576, 2.038),
        ("dynamic_llava()", 576, 0.940),
        ("full", 2880, 20.83),
        ("pyramiddrop()", 2880, 9.47),
        ("dart(keep=320)", 2880, 3.27),
    ],
)
def test_flops_reproduce_published_figures(plan: str, visual: int, teraflops: float) -> None:
    """To three digits, as the papers give them."""
    found = Plan.parse(plan).keep_counts(visual, 0, LLAVA_7B)
    assert found is not None
    assert found.flops / 1e12 == pytest.approx(teraflops, abs=0.0006 if teraflops < 4 else 0.006)


def test_published_averages() -> None:
    """Tokens per layer that the schedules of SparseVLM come to, recycled ones included."""
    for schedule, average in (((300, 200, 110), 206), ((303, 110, 36), 145), ((238, 48, 26), 114), ((66, 30, 17), 82)):
        found = Plan.parse(f"sparsevlm(schedule={schedule})").keep_counts(576, 0, LLAVA_7B)
        assert found is not None
        assert round(found.layer_average) == average


def test_dart_hands_on_what_the_official_code_does() -> None:
    found = Plan.parse("dart(keep=128, compat='official')").keep_counts(576, 0, LLAVA_7B)
    exact = Plan.parse("dart(keep=128)").keep_counts(576, 0, LLAVA_7B)
    assert found is not None
    assert exact is not None
    assert (found.tokens_per_layer[-1], exact.tokens_per_layer[-1]) == (132, 128)
