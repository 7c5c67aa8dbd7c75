"""Losses of draft heads: hand cases, edges, and the stored vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from check_golden import checker
from mmfast.training import losses


def test_soft_cross_entropy_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]).log()
    wanted = [-0.5 * math.log(0.25) - 0.5 * math.log(0.75), -math.log(0.5)]
    torch.testing.assert_close(losses.soft_cross_entropy(p, log_q), torch.tensor(wanted))


def test_what_the_drafter_excludes_costs_only_where_the_model_does_not() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert losses.divergence(p, q).item() == math.inf
    torch.testing.assert_close(losses.divergence(q, p), torch.tensor([math.log(2.0)]))


def test_laws_that_are_equal_are_no_distance_apart() -> None:
    p = torch.rand(5, 7).softmax(dim=-1)
    for distance in (losses.total_variation, losses.divergence):
        torch.testing.assert_close(distance(p, p), torch.zeros(5))


def test_masks_leave_out_even_what_is_infinite() -> None:
    values = torch.tensor([1.0, math.inf, 3.0])
    assert losses.masked_mean(values, torch.tensor([1, 0, 1])).item() == 2.0
    assert losses.masked_mean(values, torch.tensor([False, False, False])).item() == 0.0
    assert losses.masked_mean(torch.tensor([1.0, 5.0]), torch.tensor([0.1, 0.3])).item() == pytest.approx(4.0)
    assert losses.masked_mean(torch.tensor([1.0, 5.0])).item() == 3.0


def test_smooth_l1_is_square_near_and_straight_far() -> None:
    got = losses.smooth_l1(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    assert got.item() == pytest.approx((0.5 * 0.25 + 2.5) / 2)


def test_rewards_that_are_all_equal_give_no_advantage() -> None:
    p, q = torch.tensor([[0.9, 0.1]] * 3), torch.tensor([[0.5, 0.5]] * 3)
    tokens = torch.zeros(3, dtype=torch.int64)
    assert losses.acceptance_reward(p, q, tokens).tolist() == [1, 1, 1]
    assert losses.tvd_plus_plus(p, q.log(), tokens).item() == 0.0


def test_tvd_plus_plus_lifts_what_the_model_likes_better() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    p = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    loss = losses.tvd_plus_plus(p, logits.log_softmax(dim=-1), torch.tensor([0, 0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0] < 0 < gradient[1, 0]


def test_eagle1_weighs_its_parts() -> None:
    features, p = torch.randn(4, 5), torch.rand(4, 6).softmax(dim=-1)
    wanted, log_q = torch.randn(4, 5), torch.rand(4, 6).log_softmax(dim=-1)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    first = losses.masked_mean(losses.smooth_l1(features, wanted), mask)
    second = losses.masked_mean(losses.soft_cross_entropy(p, log_q), mask)
    torch.testing.assert_close(losses.eagle1(features, wanted, p, log_q, mask), first + 0.1 * second)
    other = losses.eagle1(features, wanted, p, log_q, mask, value=0.5, prob=2.0)
    torch.testing.assert_close(other, first / 2 + 2 * second)


def test_list_mle_is_the_chance_of_an_order() -> None:
    """exp(-loss) of drawing the model's order without replacement from the drafter's law over its tokens."""
    p, q = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.1, 0.6, 0.3]])
    chance = (0.6 / 1.0) * (0.3 / 0.4)
    assert losses.list_mle(p, q.log(), 3).exp().item() == pytest.approx(1 / chance)
    assert losses.list_mle(p, q.log() + 3.0, 3).exp().item() == pytest.approx(1 / chance)
    assert losses.list_mle(p, q.log(), 1).item() == 0.0


def test_equal_laws_are_ordered_by_id() -> None:
    p, q = torch.tensor([[0.4, 0.4, 0.2]]), torch.tensor([[0.6, 0.3, 0.1]])
    chance = 0.6 * (0.3 / 0.4)
    assert losses.list_mle(p, q.log(), 3).exp().item() == pytest.approx(1 / chance, rel=1e-5)


def test_decay_counts_from_where_it_is_told() -> None:
    parts = [torch.tensor(1.0)] * 3
    assert losses.decayed(parts, 0.5).item() == 1.75
    assert losses.decayed(parts, 0.5, first=1).item() == 0.875


def test_stored_vectors() -> None:
    file = Path(__file__).parent.parent / "golden" / "speculative" / "losses.json"
    check = checker(file)
    assert check is not None
    case = json.loads(file.read_text())
    check(case)
    case["expected"]["vispec"]["rank"] += 1e-9
    with pytest.raises(AssertionError, match="rank"):
        check(case)
