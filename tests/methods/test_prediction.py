"""What a plan predicts without running is what a run then reports."""

from __future__ import annotations

import pytest

import mmfast
from support.cases import one, two
from support.checks import generate
from support.families import FAMILIES, Batch

# How far a map can be pooled depends on its shape, so these cannot tell their count from a number of tokens.
POOL = {
    *("pool2d", "downsample", "dpn"),
    *("llava_mini_resampler", "m3_pool", "oryx_compressor", "pool_adapter", "tokenpacker", "uhd_resampler"),
}
METHODS = [
    info
    for info in mmfast.methods()
    if info.stage in ("before_llm", "in_llm") and "keep" in info.options and info.name not in POOL
]
LLAVA = FAMILIES["llava"]


def shape() -> mmfast.LanguageShape:
    """Return the sizes of the test model."""
    with mmfast.accelerate(LLAVA.model(), "full") as fast:
        return fast.report().shape


def compare(batch: Batch, plan: str, images: int) -> None:
    """Predict, run, and compare every figure that both know."""
    model = LLAVA.model()
    visual = sum(len(layout) for row in batch.media for media in row for layout in media.layouts)
    text = len(batch.ids[0]) - visual
    predicted = mmfast.Plan.parse(plan).keep_counts(visual, text, shape(), images=images, bytes_per_value=4)
    assert predicted is not None
    with mmfast.accelerate(model, plan) as fast:
        generate(model, batch.inputs, 2)
        report = fast.report()
    assert predicted.entered == report.entered_tokens
    assert [list(predicted.tokens_per_layer)] == report.tokens_per_layer
    assert predicted.layer_average == pytest.approx(report.layer_average)
    assert predicted.flops == report.flops
    assert predicted.full_flops == report.full_flops
    assert predicted.kv_bytes == report.kv_bytes
    assert predicted.full_kv_bytes == report.full_kv_bytes


@pytest.mark.parametrize("keep", ["0.4", "5"])
@pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)
def test_prediction_equals_the_report(info: mmfast.MethodInfo, keep: str) -> None:
    compare(one(LLAVA), f"{info.name}(keep={keep})", 1)


@pytest.mark.parametrize(
    "plan",
    [
        "scope(keep=12) + dart(keep=6)",
        "uniform(keep=0.75) + sparsevlm(keep=0.5)",
        "divprune(keep=9) + shortv(keep=0.5)",
        "fastv(keep=5) + shortv(keep=0.6)",
        "pyramiddrop(keep=0.5) + zipvl(keep=0.5)",
    ],
)
def test_stages_compose(plan: str) -> None:
    """Both the tokens that enter and the average over the layers are predicted and reported."""
    compare(one(LLAVA), plan, 1)


@pytest.mark.parametrize("plan", ["uniform(keep=7)", "fastv(keep=4)", "pyramiddrop(keep=8)", "dart(keep=6)"])
def test_a_count_is_a_count_per_image(plan: str) -> None:
    compare(two(LLAVA), plan, 2)


def test_data_decide_where_keep_is_none() -> None:
    for plan in ("prumerge(keep=None)", "pool2d(keep=4)", "downsample(keep=4)", "dpn(keep=4)"):
        assert mmfast.Plan.parse(plan).keep_counts(16, 8, shape()) is None


@pytest.mark.parametrize(
    "plan",
    [
        "knorm(keep=0.4)",
        "snapkv(keep=9)",
        'keydiff(keep=0.25, entries="visual")',
        "uniform(keep=0.5) + tova(keep=0.5)",
        "fastv(keep=0.5) + knorm(keep=0.5)",
        "pyramidkv(keep=0.5)",
        "adakv(keep=0.4)",
        "h2o(keep=0.5)",
        "streaming_llm(keep=12)",
    ],
)
def test_what_the_cache_holds_is_predicted(plan: str) -> None:
    """Keys and values alone, on average over the heads."""
    model, batch = LLAVA.model(), one(LLAVA)
    visual = sum(len(layout) for media in batch.media[0] for layout in media.layouts)
    text = len(batch.ids[0]) - visual
    predicted = mmfast.Plan.parse(plan).keep_counts(visual, text, shape(), bytes_per_value=4)
    with mmfast.accelerate(model, plan):
        cache = generate(model, batch.inputs, 1).output.past_key_values
    held = [int(layer.real_entries().sum()) for layer in cache.layers]
    values = 2 * 4 * cache.layers[0].keys.shape[-1]
    assert predicted is not None
    assert predicted.kv_bytes == sum(held) * values


def test_what_cannot_be_known_of_the_cache_is_none() -> None:
    for plan in ("vl_cache(keep=0.5)", "int8()", "lookm(keep=0.5)", "knorm(keep=0.5) + kivi()"):
        predicted = mmfast.Plan.parse(plan).keep_counts(16, 8, shape())
        assert predicted is not None
        assert predicted.kv_bytes is None
