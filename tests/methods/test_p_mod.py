"""p-MoD: its start, its schedule, its weights, and what a router learns from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.plan import Plan
from mmfast.token_pruning.in_llm.p_mod import PMoD, PModRouters, mixture_layer, p_mod_layer, prd_ratios
from support.inside import layer_tokens

DEPTH = 32
ROUTED = list(range(8, 32))


def tokens(width: int = 6, length: int = 24) -> object:
    generator = torch.Generator().manual_seed(0)
    return layer_tokens(length, range(3, 19), hidden=torch.randn(length, width, generator=generator))


def trained(path: Path, width: int = 6, layers: list[int] = ROUTED) -> dict[str, Tensor]:
    """Write random routers to a file, and return them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in layers:
        tensors[f"layers.{layer}.weight"] = torch.randn(1, width, generator=generator)
        tensors[f"layers.{layer}.bias"] = torch.randn(1, generator=generator)
    save_file(tensors, path)
    return tensors


def tangent(states: Tensor, places: Tensor) -> Tensor:
    return torch.tanh(states.cumsum(dim=0))


# ------------------------------------------------------------------------ start


def test_untrained_routers_take_the_first_tokens_and_change_nothing_else() -> None:
    route = PMoD().route(tokens(), 20, DEPTH)
    assert route.selected.tolist() == list(range(int(16 * prd_ratios(DEPTH)[20])))
    assert torch.equal(route.gate, torch.ones(16))
    assert torch.equal(route.skipped, torch.ones(16))


def test_at_the_start_a_skipped_token_stays_and_the_others_run_a_plain_layer() -> None:
    hidden, visual = torch.randn(9, 4), torch.arange(9) < 6
    weights = PModRouters(4, [0])(hidden, 0)
    output = p_mod_layer(hidden, visual, weights, 0.5, tangent, torch.sin)
    part = torch.tensor([0, 1, 2, 6, 7, 8])
    middle = hidden[part] + tangent(hidden[part], part)
    assert torch.equal(output[3:6], hidden[3:6])
    assert torch.allclose(output[part], middle + torch.sin(middle))


def test_a_sample_without_images_runs_a_plain_layer() -> None:
    hidden = torch.randn(5, 4)
    output = p_mod_layer(hidden, torch.zeros(5, dtype=torch.bool), torch.full((5,), 1.1), 0.3, tangent, torch.sin)
    middle = hidden + tangent(hidden, torch.arange(5))
    assert torch.allclose(output, middle + torch.sin(middle))


# --------------------------------------------------------------------- schedule


def test_published_schedule() -> None:
    method = PMoD()
    counts = method.keep_counts(576, 0, DEPTH)
    assert counts[:9] == [576] * 8 + [486]
    assert counts[-8:] == [86] * 8
    assert method.layers_of(DEPTH) == ROUTED
    assert sum(counts) / (576 * DEPTH) == pytest.approx(0.5375, abs=1e-3)
    assert method.keep_counts(0, 7, DEPTH) == [7] * DEPTH


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8, 1.0])
def test_keep_is_the_average_over_the_layers(keep: float, decay: str) -> None:
    counts = PMoD(keep=keep, decay=decay).keep_counts(10_000, 0, DEPTH)
    assert sum(counts) / (10_000 * DEPTH) == pytest.approx(keep, abs=1e-4)
    assert counts == sorted(counts, reverse=True)
    if keep == 1.0:
        assert PMoD(keep=keep).layers_of(DEPTH) == []


def test_a_count_holds_for_each_image_and_never_asks_for_more_than_there_is() -> None:
    assert PMoD(keep=300).keep_counts(1152, 0, DEPTH, images=2) == PMoD(keep=600).keep_counts(1152, 0, DEPTH)
    everything = PMoD(keep=600)
    assert everything.keep_counts(576, 4, DEPTH) == [580] * DEPTH
    route = everything.route(tokens(), 20, DEPTH)
    assert route.selected.numel() == 16
    assert route.gate is None
    assert min(PMoD(keep=1).keep_counts(16, 0, DEPTH)) == 1


def test_what_cannot_be_reached_is_said() -> None:
    method = PMoD(keep=0.2)
    assert "8 of 32 layers process every token, so the least, 0.250, is what it comes to" in method.notice(DEPTH)
    assert method.keep_counts(576, 0, DEPTH) == [576] * 8 + [1] * 24
    assert PMoD().notice(DEPTH) == PMoD(keep=0.25).notice(DEPTH) == PMoD(keep=3).notice(DEPTH) == ""


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to route in a model of depth 1"):
        PMoD().layers_of(1)
    for wrong, error in (({"keep": 0}, ValueError), ({"keep": None}, TypeError), ({"decay": "square"}, ValueError)):
        with pytest.raises(error, match=next(iter(wrong))):
            PMoD(**wrong)


def test_counts_are_those_of_the_routes() -> None:
    for method in (PMoD(), PMoD(keep=0.4), PMoD(keep=5)):
        counts = method.keep_counts(16, 0, DEPTH)
        found = [method.route(tokens(), layer, DEPTH).selected.numel() for layer in ROUTED]
        assert found == counts[8:]


# ---------------------------------------------------------------------- weights


def test_weights_of_a_file_decide(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    tensors = trained(path)
    prompt = tokens()
    route = PMoD(weights=str(path)).route(prompt, 20, DEPTH)
    logits = prompt.hidden[prompt.candidates] @ tensors["layers.20.weight"][0] + tensors["layers.20.bias"]
    weights = 0.2 * torch.tanh(logits) + 1
    assert torch.allclose(route.gate, weights)
    assert torch.equal(route.gate, route.skipped)
    kept = PMoD().keep_counts(16, 0, DEPTH)[20]
    assert route.selected.tolist() == sorted(weights.argsort(descending=True)[:kept].tolist())
    assert Plan.parse(f"p_mod(weights={str(path)!r})").methods == (PMoD(weights=str(path)),)


def test_half_precision_weights_and_states(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    save_file({name: value.bfloat16() for name, value in trained(path).items()}, path)
    prompt = layer_tokens(24, range(3, 19), hidden=torch.randn(24, 6).bfloat16())
    route = PMoD(weights=str(path)).route(prompt, 20, DEPTH)
    assert route.gate.dtype == torch.float32
    assert bool(((route.gate > 0.8 - 1e-6) & (route.gate < 1.2 + 1e-6)).all())


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    tensors = trained(path)
    method, prompt = PMoD(weights=str(path)), tokens()
    before = method.route(prompt, 20, DEPTH).gate
    assert torch.equal(method.route(prompt, 20, DEPTH).gate, before)
    save_file({name: -value for name, value in tensors.items()}, path)
    os.utime(path, ns=(1, 1))
    assert torch.allclose(method.route(prompt, 20, DEPTH).gate, 2 - before, atol=1e-6)


def damage(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    first = "layers.8.weight"
    if kind == "missing":
        return {name: value for name, value in tensors.items() if name != first}
    changed = {
        "unknown": ("layers.3.weight", tensors[first].clone()),
        "shape": (first, torch.zeros(1, 7)),
        "integers": (first, torch.zeros(1, 6, dtype=torch.int64)),
        "infinite": (first, torch.full((1, 6), float("inf"))),
    }
    name, value = changed[kind]
    return {**tensors, name: value}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "lacks 'layers.8.weight'; this model needs exactly"),
        ("unknown", "holds the unknown 'layers.3.weight'"),
        ("shape", r"'layers.8.weight' has shape \(1, 7\), but this model needs \(1, 6\)"),
        ("integers", r"'layers.8.weight' \(torch.int64\) must hold finite"),
        ("infinite", "'layers.8.weight' .* must hold finite floating-point numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "routers.safetensors"
    save_file(damage(trained(path), kind), path)
    with pytest.raises(ValueError, match=message):
        PMoD(weights=str(path)).route(tokens(), 20, DEPTH)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    with pytest.raises(ValueError, match="is no file; give the path of a safetensors file"):
        PMoD(weights=str(path))
    with pytest.raises(TypeError, match="must be the path of a safetensors file as text"):
        PMoD(weights=path)
    torch.save({"layers.8.weight": torch.zeros(1, 6)}, path)
    method = PMoD(weights=str(path))
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        method.route(tokens(), 20, DEPTH)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        method.route(tokens(), 20, DEPTH)


def test_building_leaves_the_random_state_alone_and_outlives_inference_mode() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        method = PMoD(keep=0.53)
        method.route(tokens(), 20, DEPTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert not method.route(tokens(), 20, DEPTH).gate.is_inference()


# --------------------------------------------------------------------- learning


def test_gradients_reach_the_router_through_both_kinds_of_token() -> None:
    routers = PModRouters(4, [0])
    hidden, visual = torch.randn(9, 4), torch.arange(9) < 6
    for own in (slice(0, 3), slice(3, 6)):
        routers.zero_grad()
        p_mod_layer(hidden, visual, routers(hidden, 0), 0.5, tangent, torch.sin)[own].square().sum().backward()
        for parameter in routers.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())
            assert bool((parameter.grad != 0).any())


def test_gradients_of_the_layer_are_exact() -> None:
    hidden, gate, skipped = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), 5, 5))
    places = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda x, g, s: mixture_layer(x, places, g, s, tangent, torch.sin), (hidden, gate, skipped)
    )
