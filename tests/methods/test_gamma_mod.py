"""gamma-MoD: who takes part, by the threshold, by a count and in training, and what the router learns from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.token_pruning.in_llm.gamma_mod import (
    GammaMoD,
    GammaRouter,
    attention_rank,
    gamma_mod_layer,
    training_route,
)
from mmfast.token_pruning.layers import LayerTokens

DEPTH = 32


def prompt(normed: Tensor, start: int = 2, total: int = 8) -> LayerTokens:
    """A prompt all of whose tokens are candidates; text has the number -1."""
    length = normed.shape[0]
    number = torch.full((length,), -1)
    number[start : start + total] = torch.arange(total)
    return LayerTokens(
        hidden=torch.zeros_like(normed),
        candidates=torch.arange(length),
        origin=number,
        media=number.clamp_max(0),
        total=total,
        media_totals=(total,),
        normed=normed,
    )


def sure(folder: Path) -> str:
    """A router that reads the logit of taking part off the first feature."""
    path = str(folder / "router.safetensors")
    save_file({"router.weight": torch.tensor([[0.0, 0.0], [1.0, 0.0]])}, path)
    return path


def states(*logits: float) -> Tensor:
    return torch.stack([torch.tensor(logits), torch.zeros(len(logits))], dim=1)


def logit(probability: float) -> float:
    return torch.logit(torch.tensor(probability)).item()


# --------------------------------------------------------------------- routing


def test_the_threshold_lets_text_skip_too(tmp_path: Path) -> None:
    normed = states(*(logit(p) for p in (0.9, 0.004, 0.006, 0.5, 0.001, 0.7, 0.2, 0.3, 0.0049, 0.0051, 0.8, 0.002)))
    route = GammaMoD(weights=sure(tmp_path)).route(prompt(normed), 3, DEPTH)
    assert route.selected.tolist() == [0, 2, 3, 5, 6, 7, 9, 10]
    assert torch.allclose(route.gate, normed[:, 0].sigmoid())
    assert route.skipped is None


def test_somebody_always_takes_part(tmp_path: Path) -> None:
    normed = states(*([-20.0] * 4), -19.0, *([-20.0] * 7))
    assert GammaMoD(weights=sure(tmp_path)).route(prompt(normed), 3, DEPTH).selected.tolist() == [4]


@pytest.mark.parametrize(("keep", "visual"), [(3, [4, 5, 9]), (0.5, [4, 5, 7, 9]), (1, [5])])
def test_with_keep_all_text_and_the_likely_visual_tokens_take_part(
    tmp_path: Path, keep: float, visual: list[int]
) -> None:
    normed = states(-9, -9, 0.1, 0.2, 2.0, 3.0, 0.0, 0.3, -1.0, 1.0, -9, -9)
    method = GammaMoD(keep=keep, weights=sure(tmp_path))
    route = method.route(prompt(normed), 3, DEPTH)
    assert route.selected.tolist() == [0, 1, *visual, 10, 11]
    counts = method.keep_counts(8, 4, DEPTH)
    assert counts == [12 if layer in (0, 1, 2, 31) else 4 + len(visual) for layer in range(DEPTH)]


def test_keep_everything_is_off() -> None:
    assert GammaMoD(keep=1.0).layers_of(DEPTH) == []
    assert GammaMoD(keep=1.0).keep_counts(8, 4, DEPTH) == [12] * DEPTH
    route = GammaMoD(keep=8).route(prompt(torch.randn(12, 4)), 3, DEPTH)
    assert route.selected.numel() == 12
    assert route.gate is None


def test_counts_are_left_to_the_data_without_keep() -> None:
    assert GammaMoD().keep_counts(8, 4, DEPTH) is None
    assert GammaMoD(keep=2).keep_counts(0, 4, DEPTH) == [4] * DEPTH
    assert GammaMoD(keep=2).keep_counts(16, 0, 5, images=2) == [16, 16, 16, 4, 16]


def test_while_decoding_the_likely_tokens_take_part(tmp_path: Path) -> None:
    path = sure(tmp_path)
    normed = states(-0.1, 0.0, 0.1)
    probability = GammaMoD(weights=path).probability(normed)
    assert GammaMoD(weights=path).decode_route(normed, 3).tolist() == [0.0, *probability[1:].tolist()]
    assert GammaMoD(keep=4, weights=path).decode_route(normed, 3).tolist() == probability.tolist()


def test_layers() -> None:
    assert GammaMoD().layers_of(5) == [3]
    assert GammaMoD(dense=[0, -2]).layers_of(4) == [1, 3]
    with pytest.raises(ValueError, match=r"dense=\(0, 1, 2, -1\) leaves no layer to convert in a model of 4 layers"):
        GammaMoD().layers_of(4)
    for wrong in ({"dense": (0.5,)}, {"threshold": 1.0}, {"threshold": -0.1}, {"keep": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GammaMoD(**wrong)


def test_the_norm_of_the_layer_is_needed() -> None:
    tokens = prompt(torch.zeros(12, 4))
    object.__setattr__(tokens, "normed", None)
    with pytest.raises(ValueError, match="'layer_norm' in needs"):
        GammaMoD().route(tokens, 3, DEPTH)


# --------------------------------------------------------------------- weights


def test_an_untrained_router_is_undecided_and_the_same_each_time() -> None:
    normed = torch.randn(500, 64)
    normed = normed / normed.norm(dim=-1, keepdim=True) * 8
    first, second = GammaMoD(), GammaMoD(threshold=0.1)
    assert torch.equal(first.probability(normed), second.probability(normed))
    assert (first.probability(normed) - 0.5).abs().mean() < 0.25
    assert first.probability(normed.bfloat16()).dtype == torch.float32


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    method = GammaMoD(weights=sure(tmp_path))
    with pytest.raises(ValueError, match=r"'router.weight' has shape \(2, 2\), but this model needs \(2, 4\)"):
        method.route(prompt(torch.zeros(12, 4)), 3, DEPTH)


# -------------------------------------------------------------------- training


@pytest.mark.parametrize(("total", "unprotected"), [(10, 6), (11, 7), (9, 9), (4, 0), (1149, 1059)])
def test_in_training_the_protected_come_first_and_half_of_the_others_skip(total: int, unprotected: int) -> None:
    probability = torch.rand(total, generator=torch.Generator().manual_seed(0))
    protected = torch.arange(total) >= unprotected
    part = training_route(probability, protected)
    assert int(part.sum()) == -(-(2 * total - unprotected) // 2)
    assert bool(part[protected].all())
    taken, left = probability[part & ~protected], probability[~part]
    assert taken.numel() == 0 or left.numel() == 0 or taken.min() >= left.max()


def test_gradients_reach_the_router_through_the_gate_and_through_its_loss() -> None:
    hidden = torch.randn(9, 4)
    part = training_route(torch.rand(9), torch.arange(9) > 5)
    for which in (0, 1):
        router = GammaRouter(4)
        found = gamma_mod_layer(hidden, router(hidden), part, lambda x, _: torch.tanh(x), torch.sin)
        found[which].square().sum().backward()
        gradient = router.router.weight.grad
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool((gradient != 0).any())


def test_the_loss_falls_as_the_router_foresees_the_choice() -> None:
    hidden, part = torch.randn(40, 4), torch.zeros(40, dtype=torch.bool)
    part[hidden[:, 0] > 0] = True
    router = GammaRouter(4)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    losses = []
    for _ in range(50):
        loss = gamma_mod_layer(hidden, router(hidden), part, lambda x, _: x, lambda x: x)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_rank_of_attention() -> None:
    uniform = torch.ones(4, 4).tril()
    uniform = uniform / uniform.sum(dim=-1, keepdim=True)
    assert attention_rank(torch.stack([uniform, torch.eye(4)])).tolist() == [3, 0]
