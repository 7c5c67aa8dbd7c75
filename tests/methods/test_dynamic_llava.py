"""Dynamic-LLaVA: the predictors, what they decide, and how they learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmfast.token_pruning.in_llm.dynamic_llava import (
    DynamicLlava,
    DynamicPredictors,
    gumbel_keep,
    keep_score,
    policy_softmax,
    rate_loss,
    temperature,
)
from support.inside import layer_tokens

DEPTH = 32


def small(**options: object) -> DynamicLlava:
    return DynamicLlava(predictor_width=16, predictor_heads=2, **options)


# ------------------------------------------------------------------------ choices


def test_counts_are_cut_off() -> None:
    assert DynamicLlava().keep_counts(576, 10, DEPTH) == [586] * 2 + [125] * 30
    assert DynamicLlava(keep=0.5).counts(49, DEPTH) == [24]
    assert DynamicLlava(keep=9).counts(64, DEPTH, 2) == [18]
    assert DynamicLlava(keep=0.001).counts(49, DEPTH) == [1]
    assert not DynamicLlava.reads_question


def test_the_likeliest_stay() -> None:
    hidden = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    tokens, method = layer_tokens(30, range(4, 24), hidden=hidden), small(keep=0.26)
    decision = method(tokens, method.events(DEPTH)[0])
    scores = keep_score(method.predictors(hidden).vision(hidden[None, 4:24])[0])
    assert decision is not None
    assert decision.indices.tolist() == sorted(scores.argsort(descending=True)[:5].tolist())


def test_each_image_is_judged_by_itself() -> None:
    hidden = torch.randn(30, 12)
    method = small()
    event = method.events(DEPTH)[0]
    both = layer_tokens(30, range(4, 24), media_totals=(8, 12), hidden=hidden)
    second = layer_tokens(30, range(12, 24), hidden=hidden)
    together = method.score(both, event)
    assert torch.allclose(together[8:], method.score(second, event), atol=1e-6)
    changed = hidden.clone()
    changed[4:12] = torch.randn(8, 12)
    other = method.score(layer_tokens(30, range(4, 24), media_totals=(8, 12), hidden=changed), event)
    assert torch.allclose(other[8:], together[8:], atol=1e-6)
    assert not torch.equal(other[:8], together[:8])


def test_the_score_depends_on_the_other_tokens_of_the_image() -> None:
    predictor = DynamicPredictors(12, 16, 2).vision
    states = torch.randn(1, 10, 12)
    changed = states.clone()
    changed[0, 5] = torch.randn(12)
    assert not torch.equal(predictor(states)[0, 0], predictor(changed)[0, 0])
    # A token that the policy takes out tells the others nothing.
    policy = torch.ones(1, 10, 1)
    policy[0, 5] = 0.0
    assert torch.allclose(predictor(states, policy)[0, 0], predictor(changed, policy)[0, 0], atol=1e-6)


def test_generated_tokens_are_decided_one_by_one(tmp_path: Path) -> None:
    both = DynamicPredictors(12, 16, 2)
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter)
    path = str(tmp_path / "predictors.safetensors")
    save_file(both.state_dict(), path)
    method, states = small(weights=path), torch.randn(200, 12)
    kept = method.decode_keep(states)
    assert kept.dtype == torch.bool
    assert 0 < int(kept.sum()) < 200
    assert torch.equal(method.decode_keep(states[:7]), kept[:7])
    assert torch.equal(kept, both.text(states)[:, 0] > both.text(states)[:, 1])


# ------------------------------------------------------------------------ weights


def test_untrained_predictors_are_undecided_and_the_same_each_time() -> None:
    hidden = torch.randn(1, 40, 64)
    predictors = DynamicLlava().predictors(hidden)
    for logits in (predictors.vision(hidden), predictors.text(hidden)):
        assert (logits[..., 0] - logits[..., 1]).abs().max() < 0.1
    assert torch.equal(DynamicLlava(keep=0.3).predictors(hidden).vision(hidden), predictors.vision(hidden))
    assert predictors.vision(hidden.bfloat16()).dtype == torch.float32


def test_weights_come_back_and_misfits_are_refused(tmp_path: Path) -> None:
    both, states = DynamicPredictors(12, 16, 2), torch.randn(1, 10, 12)
    path = str(tmp_path / "predictors.safetensors")
    save_file(both.state_dict(), path)
    method = small(weights=path)
    assert torch.equal(method.predictors(states).vision(states), both.vision(states))
    with pytest.raises(ValueError, match=r"'vision.down_mlp.1.weight' has shape \(16, 12\), but .* \(32, 12\)"):
        DynamicLlava(predictor_width=32, predictor_heads=2, weights=path).predictors(states)
    for wrong in ({"predictor_width": 0}, {"predictor_heads": True}, {"predictor_width": 18}, {"predictor_heads": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DynamicLlava(**wrong)


# ----------------------------------------------------------------------- learning


def test_attention_under_a_hard_policy_is_attention_without_the_dropped() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -math.inf)
    policy = (torch.rand(2, 12, 1) > 0.5).float()
    policy[:, 0] = 1.0
    found = policy_softmax(logits, policy)
    for sample in range(2):
        kept = policy[sample, :, 0].nonzero().squeeze(-1)
        own = logits[sample][:, kept][:, :, kept].softmax(dim=-1)
        assert torch.allclose(found[sample][:, kept][:, :, kept], own, atol=1e-5)
        gone = (policy[sample, :, 0] == 0).nonzero().squeeze(-1)
        assert found[sample][:, kept][:, :, gone].max() < 1e-5
        # A dropped token still sees itself.
        assert found[sample][:, gone, gone].min() > 1e-4


def test_rows_that_see_nothing_are_finite() -> None:
    logits = torch.full((1, 3, 3), -math.inf, requires_grad=True)
    policy = torch.zeros(3, 1, requires_grad=True)
    found = policy_softmax(logits, policy)
    found.sum().backward()
    assert bool(found.isfinite().all())
    assert bool(logits.grad.isfinite().all())
    assert bool(policy.grad.isfinite().all())


def test_decisions_are_hard_follow_the_probability_and_let_gradients_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([math.log(0.3), math.log(0.7)]).expand(20_000, 2).bfloat16().requires_grad_()
    mask = gumbel_keep(logits, 0.5, generator)
    assert mask.dtype == torch.float32
    assert mask.detach().round(decimals=5).unique().tolist() == [0.0, 1.0]
    # Four standard deviations of the share, and what the rounding of the logits to bfloat16 makes.
    assert mask.mean().item() == pytest.approx(0.3, abs=0.015)
    mask.sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad != 0).any())


def test_temperature_falls() -> None:
    assert [round(temperature(step, 4), 4) for step in range(5)] == [1.0, 0.5623, 0.3162, 0.1778, 0.1]


def test_rate_is_punished_sample_by_sample() -> None:
    apart = [torch.ones(10), torch.zeros(10)]
    assert rate_loss(apart, 0.5).item() == pytest.approx(0.25)
    assert rate_loss([torch.tensor([1.0, 0.0])] * 2, 0.5).item() == 0.0
    assert rate_loss([torch.ones(4), torch.zeros(0)], 0.2).item() == pytest.approx(0.64)
    assert rate_loss([], 0.2).item() == 0.0


def test_gradients_reach_every_part_of_the_predictors_and_the_rate_is_learned() -> None:
    torch.manual_seed(0)
    both, states = DynamicPredictors(12, 16, 2), torch.randn(4, 40, 12)
    optimizer = torch.optim.Adam(both.parameters(), lr=2e-2)

    def loss() -> torch.Tensor:
        masks = [gumbel_keep(logits) for logits in (*both.vision(states), *both.text(states))]
        return rate_loss(masks, 0.2)

    start = loss()
    start.backward()
    for name, parameter in both.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name
    for _ in range(50):
        optimizer.zero_grad()
        current = loss()
        current.backward()
        optimizer.step()
    assert current.item() < 0.3 * start.item()
    for logits in (both.vision(states), both.text(states)):
        share = logits.softmax(dim=-1)[..., 0].mean().item()
        assert share == pytest.approx(0.2, abs=0.1)
