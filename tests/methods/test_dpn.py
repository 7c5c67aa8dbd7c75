"""DPN: maps, strides, the schedule of ``keep``, the router and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.token_pruning.in_llm.dpn import STRIDES, DpnRouters, DynamicPyramid, draw_expert, hinge_loss, pool_map
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Keep, Layout
from support.inside import layer_tokens

DEPTH = 32


def prompt(layouts: list[Layout], width: int = 8, **more: Any) -> LayerTokens:
    totals = [len(layout) for layout in layouts]
    count = sum(totals)
    hidden = torch.randn(count + 5, width, generator=torch.Generator().manual_seed(0))
    return layer_tokens(
        count + 5, range(2, count + 2), media_totals=totals, hidden=hidden, layouts=tuple(layouts), **more
    )


def narrowed(tokens: LayerTokens, decision: Keep) -> LayerTokens:
    """The prompt after a decision."""
    gone = torch.ones(tokens.candidates.numel(), dtype=torch.bool)
    gone[decision.indices] = False
    stays = torch.ones(tokens.hidden.shape[0], dtype=torch.bool)
    stays[tokens.candidates[gone]] = False
    hidden = tokens.hidden.clone()
    written = ~decision.features.isnan().any(dim=-1)
    hidden[tokens.candidates[decision.indices[written]]] = decision.features[written]
    place = stays.cumsum(0) - 1
    return LayerTokens(
        hidden[stays],
        place[tokens.candidates[decision.indices]],
        tokens.origin[decision.indices],
        tokens.media[decision.indices],
        tokens.total,
        tokens.media_totals,
        layouts=tokens.layouts,
    )


def leaning(folder: Path, expert: int, width: int = 8, steps: int = 3) -> str:
    """Routers that are almost sure of one stride whatever they read."""
    tensors: dict[str, Tensor] = {}
    for step in range(steps):
        choose = torch.zeros(3, width // 4)
        choose[expert] = 100.0
        tensors[f"routers.{step}.norm.weight"] = torch.zeros(width)
        tensors[f"routers.{step}.norm.bias"] = torch.ones(width)
        tensors[f"routers.{step}.reduce.weight"] = torch.ones(width // 4, width)
        tensors[f"routers.{step}.choose.weight"] = choose
    path = str(folder / "routers.safetensors")
    save_file(tensors, path)
    return path


def run(method: DynamicPyramid, tokens: LayerTokens, depth: int = DEPTH) -> list[int]:
    """How many visual tokens are left after each event."""
    left = []
    for event in method.events(depth):
        decision = method(tokens, event)
        tokens = tokens if decision is None else narrowed(tokens, decision)
        left.append(tokens.candidates.numel())
    return left


# ------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 16), (16, 1)])
def test_every_map_is_pooled_by_the_chosen_stride_into_the_first_slots(
    tmp_path: Path, expert: int, height: int, width: int
) -> None:
    tokens = prompt([Layout.grid(height, width)])
    method = DynamicPyramid(weights=leaning(tmp_path, expert))
    decision = method(tokens, method.events(DEPTH)[0])
    assert decision is not None
    down, across = min(STRIDES[expert][0], height), min(STRIDES[expert][1], width)
    slots, rows = [], []
    states = tokens.hidden[tokens.candidates].reshape(height, width, -1)
    for row in range(0, height - down + 1, down):
        for column in range(0, width - across + 1, across):
            slots.append(row * width + column)
            rows.append(states[row : row + down, column : column + across].amax(dim=(0, 1)))
    assert decision.indices.tolist() == slots
    assert torch.allclose(decision.features, torch.stack(rows), rtol=1e-4)


def test_frames_and_tiles_are_maps_of_their_own_and_crops_are_not(tmp_path: Path) -> None:
    crops = Layout.grid(4, 8)
    crops = Layout(**{**vars(crops), "crop": (crops.col >= 4).long(), "crop_grid": (1, 2)})
    tokens = prompt([Layout.grid(4, 4, frames=3, modality="video"), crops])
    method = DynamicPyramid(weights=leaning(tmp_path, 2))
    decision = method(tokens, method.events(DEPTH)[0])
    assert decision is not None
    per_frame = [0, 2, 8, 10]
    frames = [16 * frame + place for frame in range(3) for place in per_frame]
    assert decision.indices.tolist() == [*frames, *(48 + place for place in (0, 2, 4, 6, 16, 18, 20, 22))]
    alone = DynamicPyramid(weights=method.weights, scope="per_image")(tokens, method.events(DEPTH)[0])
    assert alone is not None
    assert alone.indices.tolist() == decision.indices.tolist()
    assert torch.equal(alone.features, decision.features)


def test_a_pooled_map_is_pooled_again_and_small_ones_are_spared(tmp_path: Path) -> None:
    method = DynamicPyramid(weights=leaning(tmp_path, 2))
    assert run(method, prompt([Layout.grid(16, 16)])) == [64, 16, 4]
    assert run(method, prompt([Layout.grid(5, 8)])) == [8, 8, 8]
    assert run(DynamicPyramid(weights=method.weights, smallest=8), prompt([Layout.grid(5, 8)])) == [8, 2, 2]
    # A small map beside a large one stays as it is, to the last bit.
    tokens = prompt([Layout.grid(3, 5), Layout.grid(4, 4)])
    decision = method(tokens, method.events(DEPTH)[0])
    assert decision.indices.tolist() == [*range(15), 15, 17, 23, 25]
    assert decision.features[:15].isnan().all()
    assert not decision.features[15:].isnan().any()


def test_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        states = torch.randn(12, 8).to(dtype)
        assert pool_map(states, 3, 4, (2, 2)).dtype == dtype
        tokens = prompt([Layout.grid(4, 4)])
        object.__setattr__(tokens, "hidden", tokens.hidden.to(dtype))
        decision = DynamicPyramid(keep=0.3)(tokens, DynamicPyramid().events(DEPTH)[0])
        assert decision.features.dtype == dtype
        assert bool(decision.features.isfinite().all())


def test_maps_must_be_known_and_whole() -> None:
    method = DynamicPyramid()
    with pytest.raises(ValueError, match="dpn needs to know the grid"):
        method(prompt([Layout.unknown(20)]), method.events(DEPTH)[0])
    with pytest.raises(ValueError, match="dpn needs to know the grid"):
        method(layer_tokens(20, range(16), hidden=torch.zeros(20, 8)), method.events(DEPTH)[0])
    with pytest.raises(ValueError, match="dpn needs full grids, but 17 tokens lie on 3 rows and 6 columns"):
        method(prompt([Layout.grid(3, 6).take(torch.arange(17))]), method.events(DEPTH)[0])


# ----------------------------------------------------------------------- schedule


@pytest.mark.parametrize("keep", [0.3, 0.46875, 0.6, 0.9, 40, 200])
def test_each_step_takes_the_coarsest_stride_that_reaches_the_schedule(keep: float) -> None:
    method = DynamicPyramid(keep=keep)
    left, current, expected = run(method, prompt([Layout.grid(16, 24)])), (16, 24), []
    for fraction in method.solved(384, DEPTH):
        options = [(current[0] // down, current[1] // across) for down, across in STRIDES]
        current = min(
            (size for size in options if size[0] * size[1] >= int(fraction * 384)), key=lambda size: size[0] * size[1]
        )
        expected.append(current[0] * current[1])
    assert left == expected
    assert all(count >= int(fraction * 384) for count, fraction in zip(left, method.solved(384, DEPTH), strict=True))


def test_published_fractions_are_met_by_halving() -> None:
    assert run(DynamicPyramid(keep=0.46875), prompt([Layout.grid(16, 16)])) == [128, 64, 32]


def test_keep_everything_is_off() -> None:
    assert DynamicPyramid(keep=1.0).events(DEPTH) == []
    assert DynamicPyramid(keep=1.0).keep_counts(16, 3, 4) == [19] * 4
    method, tokens = DynamicPyramid(keep=16), prompt([Layout.grid(4, 4)])
    assert [method(tokens, event) for event in method.events(DEPTH)] == [None] * 3


def test_counts_are_left_to_the_data() -> None:
    assert DynamicPyramid().keep_counts(16, 3, DEPTH) is None
    assert DynamicPyramid(keep=0.5).keep_counts(16, 3, DEPTH) is None
    assert "cannot be reached" in DynamicPyramid(keep=0.2).notice(DEPTH)
    assert run(DynamicPyramid(keep=0.2), prompt([Layout.grid(16, 16)])) == [64, 16, 4]
    with pytest.raises(ValueError, match="smallest=0"):
        DynamicPyramid(smallest=0)


# ------------------------------------------------------------------------- router


def test_untrained_routers_are_almost_undecided_and_the_same_each_time() -> None:
    state = torch.randn(64)
    for step in range(3):
        assert (DpnRouters(64, 3)(state, step) - 1 / 3).abs().max() < 0.05
    tokens = prompt([Layout.grid(4, 4)])
    decisions = [method(tokens, method.events(DEPTH)[0]) for method in (DynamicPyramid(), DynamicPyramid(smallest=4))]
    assert torch.equal(decisions[0].features, decisions[1].features)
    scale = decisions[0].features.abs().max() / tokens.hidden[tokens.candidates].abs().max()
    assert 0.2 < scale < 0.5


def test_weights_must_fit_the_steps(tmp_path: Path) -> None:
    path = leaning(tmp_path, 0, steps=2)
    method = DynamicPyramid(weights=path)
    with pytest.raises(ValueError, match=r"lacks 'routers\.2\.norm\.weight'"):
        method(prompt([Layout.grid(4, 4)]), method.events(DEPTH)[0])


def test_drawn_strides_leave_enough() -> None:
    torch.manual_seed(0)
    probability = torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.tensor([draw_expert(probability, [64, 32, 16]) for _ in range(600)])
    shares = torch.bincount(drawn, minlength=3) / 600
    assert shares[2] == 0
    assert shares[0].item() == pytest.approx(0.4, abs=0.08)
    assert draw_expert(probability, [16, 8, 4]) == 0


def test_gradients_of_the_loss_reach_the_routers_until_the_target_is_reached() -> None:
    routers = DpnRouters(16, 2)
    # A stride of scale above 0 must be the likely one, or there is nothing to push.
    for router in routers.routers:
        torch.nn.init.constant_(router.norm.bias, 1.0)
        torch.nn.init.constant_(router.reduce.weight, 0.5)
        with torch.no_grad():
            router.choose.weight[2] += 0.3
    states, layer = torch.randn(4, 16), torch.tensor([0, 1, 0, 1])
    probability = torch.stack([routers(state, int(step)) for state, step in zip(states, layer, strict=True)])
    hinge_loss(probability, layer).backward()
    for router in routers.routers:
        for parameter in (router.reduce.weight, router.choose.weight):
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())
            assert bool((parameter.grad != 0).any())
    done = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    loss = hinge_loss(done, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0.0
    assert not bool(done.grad.any())
