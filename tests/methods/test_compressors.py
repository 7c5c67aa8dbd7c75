"""Learned projectors and compressors: cases worked out by hand, and what their papers promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.ccam import CausalCrossAttention, causal_frames
from mmfast.token_pruning.before_llm.llava_mini_resampler import LlavaMiniResampler
from mmfast.token_pruning.before_llm.mqt import MqtResampler
from mmfast.token_pruning.before_llm.oryx_compressor import OryxCompressor
from mmfast.token_pruning.before_llm.pool_adapter import PoolAdapter
from mmfast.token_pruning.before_llm.tokenpacker import TokenPacker
from mmfast.token_pruning.before_llm.uhd_resampler import UhdResampler, slice_grid
from mmfast.token_pruning.projector_base import Blocks, block_size, raster_grid, resized_table, sincos, square_table
from mmfast.tokens import Keep, Layout, VisualTokens
from mmfast.training.modules.deepstack import dilated_sets

LEARNED = (
    "ccam(heads=2)",
    "llava_mini_resampler(heads=2)",
    "mqt(heads=2, queries=16)",
    "oryx_compressor()",
    "pool_adapter()",
    "tokenpacker(heads=2)",
    "uhd_resampler(heads=2)",
)


def build(text: str, **options: object) -> object:
    name, _, rest = text.partition("(")
    own = dict(pair.split("=") for pair in rest.rstrip(")").split(", ") if pair)
    return get(name).method(**{key: int(value) for key, value in own.items()}, **options)


def seen(rows: int, cols: int, width: int = 8, out: int = 12, frames: int = 1) -> VisualTokens:
    """Tokens with features of the encoder beside them."""
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    total = rows * cols * frames
    patches = torch.randn(total, width, generator=generator)
    features = torch.randn(total, out, generator=generator)
    return VisualTokens(features, Layout.grid(rows, cols, frames=frames), signals={"patch_features": patches})


# ------------------------------------------------------------------------------ grids and tables


def test_blocks_at_the_border_are_averages_of_what_is_there() -> None:
    values = torch.arange(9.0)[:, None]
    blocks = Blocks(3, 3, 2)
    kept = blocks.keep(blocks.mean(values))
    assert kept.features is not None
    assert kept.features.flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
    assert kept.indices.tolist() == [0, 2, 6, 8]
    assert kept.sizes is not None
    assert kept.sizes.tolist() == [4.0, 2.0, 2.0, 1.0]
    assert kept.source is not None
    assert kept.source.tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]


def test_the_official_border_is_lost() -> None:
    blocks = Blocks(3, 3, 2, drop=True)
    kept = blocks.keep(blocks.mean(torch.arange(9.0)[:, None]))
    assert kept.features is not None
    assert kept.features.flatten().tolist() == [2.0]
    assert kept.source is not None
    assert kept.source.tolist() == [0, 0, -1, 0, 0, -1, -1, -1, -1]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 150))
def test_the_smallest_block_that_meets_the_budget_is_taken(rows: int, cols: int, kept: int) -> None:
    side = block_size(rows, cols, kept)
    down, right = Blocks(rows, cols, side).shape
    assert down * right <= kept
    if side > 1:
        down, right = Blocks(rows, cols, side - 1).shape
        assert down * right > kept


def test_a_tall_grid_that_no_block_divides_is_refused_where_asked() -> None:
    with pytest.raises(ValueError, match=r"grid of 3 x 5, which no square block divides; possible are 15, or any"):
        block_size(3, 5, 4, "refuse")
    assert block_size(4, 6, 6, "refuse") == 2
    assert block_size(5, 7, 6, "drop") == 2


def test_only_full_rasters_are_grids() -> None:
    whole = seen(3, 4)
    assert raster_grid(whole) == (3, 4)
    assert raster_grid(whole.take(torch.arange(4, 12))) == (2, 4)
    assert raster_grid(whole.take(torch.tensor([0, 1, 2, 3, 4]))) is None
    assert raster_grid(seen(2, 2, frames=2)) is None


def test_the_table_tells_columns_first() -> None:
    table = square_table(3, 8)
    code = sincos(torch.arange(3.0), 4)
    for row in range(3):
        for col in range(3):
            assert torch.equal(table[row * 3 + col], torch.cat([code[col], code[row]]))
    assert code[2].tolist() == pytest.approx([0.9092974, 0.0199987, -0.4161468, 0.9998], abs=1e-6)


def test_a_table_of_its_own_size_stays_as_it_is() -> None:
    table = square_table(4, 8)
    torch.testing.assert_close(resized_table(table, 4, 4), table, rtol=0, atol=1e-6)
    # One place is the same everywhere.
    torch.testing.assert_close(resized_table(square_table(1, 8), 2, 3), square_table(1, 8).expand(6, -1))


# ------------------------------------------------------------------------------ averages


@pytest.mark.parametrize(("keep", "count"), [(576, None), (144, 144), (36, 36), (9, 9), (1, 1), (100, 64)])
def test_m3_scales_are_those_of_the_paper_and_pool_as_pool2d(keep: int, count: int | None) -> None:
    tokens = seen(24, 24)
    decision = get("m3_pool").method(keep=keep)(tokens)
    if count is None:
        assert decision is None
        return
    assert decision is not None
    assert len(decision) == count
    other = get("pool2d").method(keep=count)(tokens)
    torch.testing.assert_close(decision.features, other.features)
    assert torch.equal(decision.indices, other.indices)


def test_m3_says_which_scales_there_are() -> None:
    with pytest.raises(ValueError, match="possible are 60, 15, or any count"):
        get("m3_pool").method(keep=2, border="refuse")(seen(6, 10))
    with pytest.raises(ValueError, match="needs to know the grid"):
        get("m3_pool").method(keep=2)(VisualTokens.from_features(torch.ones(9, 4)))


def test_pool_adapter_pools_then_projects() -> None:
    tokens = seen(4, 4)
    method = get("pool_adapter").method(keep=4)
    decision = method(tokens)
    (module,) = method.trained_parts()
    patches = tokens.signals["patch_features"].reshape(2, 2, 2, 2, 8).mean(dim=(1, 3)).reshape(4, 8)
    torch.testing.assert_close(decision.features, module.mlp(patches))
    assert decision.space == "llm"
    with pytest.raises(ValueError, match="no square block divides"):
        PoolAdapter(8, 12)(torch.randn(1, 15, 8), (3, 5), 4)


def test_oryx_doubles_what_it_does_not_shrink() -> None:
    features = torch.randn(2, 12, 8)
    found, grid = OryxCompressor(8)(features, (3, 4), "image")
    torch.testing.assert_close(found, 2 * features)
    assert grid == (3, 4)


def test_oryx_without_preference_is_twice_the_average_and_looks_where_the_key_is() -> None:
    module = OryxCompressor(2)
    for weight in module.parameters():
        torch.nn.init.zeros_(weight)
    features = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [6.0, 0.0]]])
    assert module(features, (2, 2), "video")[0].tolist() == [[[6.0, 0.0]]]
    with torch.no_grad():
        # Scores 16 * 3 * value / 16: the softmax sees 3, 6, 9 and 18.
        module.vlm_query_projector.weight[0, 0] = 16.0
        module.vlm_key_projector.weight[0, 0] = 1.0
    weights = torch.tensor([3.0, 6.0, 9.0, 18.0]).softmax(dim=0)
    expected = 3.0 + float(weights @ torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert module(features, (2, 2), "video")[0][0, 0, 0].item() == pytest.approx(expected)


def test_oryx_counts_scores_that_are_no_number_as_nothing() -> None:
    module = OryxCompressor(2)
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        module.vlm_key_projector.bias[0] = torch.nan
    found = module.compress(features, Blocks(1, 2, 2))
    assert found.tolist() == [[[4.0, 0.0]]]


@pytest.mark.parametrize(("mode", "problem"), [("film", "must be one of"), (0, "must be one of"), (2, "do not divide")])
def test_oryx_refuses(mode: str | int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OryxCompressor(8)(torch.randn(1, 9, 8), (3, 3), mode)


# ------------------------------------------------------------------------------ blocks that look


def test_layers_come_back_from_a_plan_file_as_they_were() -> None:
    method = get("tokenpacker").method(layers=[0.5, 2])
    assert method == get("tokenpacker").method(layers=(0.5, 2))
    assert [spec.layer for spec in method.vision_signals().values()] == ["features", 0.5, 2]
    for wrong in ((), "all", (True,)):
        with pytest.raises(ValueError, match="must name at least one block"):
            get("tokenpacker").method(layers=wrong)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_a_packed_token_sees_its_own_block_alone(side: int) -> None:
    torch.manual_seed(0)
    module, rows = TokenPacker(8, 16, 12, heads=2), 12
    features, levels = torch.randn(1, rows * rows, 8), torch.randn(1, rows * rows, 16)
    before = module(features, levels, (rows, rows), side)
    owner = Blocks(rows, rows, side).owner()
    for place in (0, 17, 100):
        changed, others = levels.clone(), features.clone()
        changed[0, place] += 1
        others[0, place] += 1
        after = module(others, changed, (rows, rows), side)
        differs = (after != before).any(dim=-1)[0]
        assert differs.nonzero().flatten().tolist() == [int(owner[place])]


def test_smaller_blocks_at_the_border_look_at_what_is_there() -> None:
    torch.manual_seed(0)
    module = TokenPacker(8, 16, 12, heads=2)
    features, levels = torch.ones(1, 9, 8), torch.randn(1, 9, 16)
    found = module.pack(features, levels, Blocks(3, 3, 2))
    # The last corner is one token: it takes all the attention there is.
    alone = module.pack(features[:, :1], levels[:, 8:], Blocks(1, 1, 1))
    torch.testing.assert_close(found[:, 3:], alone)


# ------------------------------------------------------------------------------ queries


def test_fewer_queries_give_the_first_rows_of_more() -> None:
    torch.manual_seed(0)
    module, features = MqtResampler(8, 12, queries=16, heads=2), torch.randn(2, 12, 8)
    whole = module(features, (3, 4))
    assert whole.shape == (2, 16, 12)
    for count in (1, 5, 16):
        torch.testing.assert_close(module(features, (3, 4), count), whole[:, :count])


@pytest.mark.parametrize("official", [True, False])
def test_with_official_keys_nobody_looks_by_content(official: bool) -> None:
    """Then what one patch adds does not depend on the other patches."""
    torch.manual_seed(0)
    module = MqtResampler(8, 12, queries=4, heads=2)
    with torch.no_grad():
        module.attn.in_proj_weight.mul_(20)
    first, second = torch.randn(2, 6, 8).unbind()
    second[2] = first[2]
    effects = []
    for features in (first, second):
        changed = features.clone()
        changed[2] = torch.linspace(-1, 3, 8)
        before, after = (module(x[None], (2, 3), official_keys=official) for x in (features, changed))
        effects.append(after - before)
    same = torch.allclose(effects[0], effects[1], atol=1e-5)
    assert same == official


def test_there_are_only_so_many_queries() -> None:
    with pytest.raises(ValueError, match="keep leaves 5 tokens per image or tile, but there are queries=4 only"):
        get("mqt").method(keep=5, queries=4, heads=2)(seen(3, 4))
    with pytest.raises(ValueError, match="queries=5 must be a square number"):
        get("mqt").method(queries=5)
    with pytest.raises(ValueError, match="heads=16 must divide the width 8"):
        get("mqt").method(keep=4)(seen(3, 4))


@given(st.integers(1, 40), st.integers(1, 40))
def test_later_queries_see_more_frames_and_the_last_all(queries: int, frames: int) -> None:
    mask = causal_frames(queries, frames)
    assert bool(mask[-1].all())
    assert bool(mask[:, 0].all())
    count = mask.sum(dim=1)
    assert bool((count.diff() >= 0).all())
    assert bool((mask[:, :-1] | ~mask[:, 1:]).all())
    if queries >= frames:
        assert count.tolist() == [query * frames // queries + 1 for query in range(queries)]
    if frames == 1:
        assert bool(mask.all())


def test_a_query_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    module, features = CausalCrossAttention(6, 8, queries=4, heads=2), torch.randn(1, 8, 6)
    layout = Layout.grid(2, 2, frames=2)
    before = module(features, layout.frame, layout.row, layout.col)
    changed = features.clone()
    changed[0, 4:] += 1
    differs = (module(changed, layout.frame, layout.row, layout.col) != before).any(dim=-1)[0]
    assert differs.tolist() == [False, False, True, True]


def test_ccam_reads_all_frames_of_a_video_together() -> None:
    decision = get("ccam").method(keep=4, heads=2)(seen(2, 2, frames=3))
    assert len(decision) == 4
    assert decision.indices.tolist() == [1, 4, 7, 10]


def test_resamplers_know_the_shape_of_what_they_read() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 12, 8)
    for module in (UhdResampler(8, 8, side=2, heads=2), LlavaMiniResampler(8, side=2, heads=2)):
        with torch.no_grad():
            module.attn.in_proj_weight.mul_(20)
        assert not torch.allclose(module(features, (3, 4)), module(features, (2, 6)), atol=1e-4)


def test_one_query_sees_a_bag_of_patches() -> None:
    """The table of a single place is the same everywhere, so order cannot matter."""
    torch.manual_seed(0)
    module, features = LlavaMiniResampler(8, side=1, heads=2), torch.randn(1, 12, 8)
    torch.testing.assert_close(module(features.flip(1), (3, 4)), module(features, (3, 4)))


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(336, 336, (1, 1)), (672, 672, (2, 2)), (672, 1088, (2, 3)), (1344, 336, (4, 1)), (4000, 4000, (2, 3))],
)
def test_slices_follow_the_shape_of_the_picture(width: int, height: int, grid: tuple[int, int]) -> None:
    assert slice_grid(width, height) == grid


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("text", LEARNED)
def test_weights_come_back_from_their_file(text: str, tmp_path: Path) -> None:
    tokens, method = seen(4, 4), build(text, keep=4)
    with torch.no_grad():
        method(tokens)
    (module,) = method.trained_parts()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    path = tmp_path / "module.safetensors"
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    expected = values(method(tokens))
    assert not torch.allclose(expected, values(build(text, keep=4)(tokens)))
    assert torch.equal(values(build(text, keep=4, weights=str(path))(tokens)), expected)
    save_file({"another": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="lacks"):
        build(text, keep=4, weights=str(path))(tokens)


@pytest.mark.parametrize("text", LEARNED)
def test_what_is_trained_gets_gradients_and_so_do_the_features(text: str) -> None:
    tokens, method = seen(4, 4), build(text, keep=4)
    method(tokens)
    (module,) = method.trained_parts()
    module.requires_grad_(True)
    patches = tokens.signals["patch_features"].requires_grad_()
    values(method(tokens)).square().sum().backward()
    reached = [name for name, weight in module.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert len(reached) >= len(list(module.parameters())) // 2
    assert (patches.grad is not None) == (text != "oryx_compressor()" and "llava_mini" not in text)


def values(decision: Keep | None) -> Tensor:
    assert decision is not None
    assert decision.features is not None
    return decision.features


def test_other_counts_work_with_the_same_module() -> None:
    tokens, many = seen(4, 4), build("mqt(heads=2, queries=16)", keep=9)
    few = many.at(4)
    torch.testing.assert_close(values(few(tokens)), values(many(tokens))[:4])
    (module,) = few.trained_parts()
    with torch.no_grad():
        module.proj.mul_(2)
    assert many.trained_parts() == [module]
    torch.testing.assert_close(values(few(tokens)), values(many(tokens))[:4])


def test_blocks_cross_no_frame_whatever_the_scope() -> None:
    both = seen(2, 2, frames=2)
    found = [get("m3_pool").method(keep=2, scope=scope)(both) for scope in ("global", "per_tile")]
    expected = both.features.unflatten(0, (2, 4)).mean(dim=1)
    for decision in found:
        torch.testing.assert_close(values(decision), expected)
        assert decision.indices.tolist() == [0, 4]


def test_tiles_are_read_one_by_one() -> None:
    both = seen(2, 2, frames=2)
    method = build("mqt(heads=2, queries=16)", keep=4)
    decision = method(both)
    first = method.at(2)(both.take(torch.arange(4)))
    torch.testing.assert_close(values(decision)[:2], values(first))
    assert [index // 4 for index in decision.indices.tolist()] == [0, 0, 1, 1]


def test_features_of_the_encoder_go_through_the_projector_where_it_works_token_by_token() -> None:
    tokens = seen(4, 4)
    projectable = VisualTokens(tokens.features, tokens.layout, 0, tokens.signals, True)
    for text in ("oryx_compressor()", "llava_mini_resampler(heads=2)"):
        method = build(text, keep=4)
        plain, through = method(tokens), method(projectable)
        assert (plain.space, plain.features.shape[1]) == ("llm", 12)
        assert (through.space, through.features.shape[1]) == ("vision", 8)


def test_the_average_of_dilated_sets_is_the_pooled_map() -> None:
    """Two ways to shrink a map that must agree on what a block is."""
    large = torch.randn(6, 6, 3)
    pooled = Blocks(6, 6, 2).mean(large.reshape(36, 3))
    torch.testing.assert_close(dilated_sets(large).mean(dim=0), pooled)
