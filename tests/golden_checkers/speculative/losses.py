"""Losses of draft heads."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.training import losses


def check(case: dict[str, Any]) -> None:
    """Compute every loss of the file through the functions that training calls."""
    real = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("p", "q", "mask")}
    p, q, mask = real["p"], real["q"], real["mask"]
    wanted = torch.tensor(case["feature_target"], dtype=torch.float64)
    features = torch.tensor(case["feature_pred"], dtype=torch.float64)
    tokens = torch.tensor(case["sampled_tokens"])
    due: dict[str, Any] = case["expected"]

    cross = losses.soft_cross_entropy(p, q.log())
    _close("soft_ce_per_position", cross, due)
    _close("soft_ce_masked_mean", losses.masked_mean(cross, mask), due)
    _close("tvd_per_position", losses.total_variation(p, q), due)
    _close("kl_p_q", losses.divergence(p, q), due)
    _close("kl_q_p", losses.divergence(q, p), due)

    reward = losses.acceptance_reward(p, q, tokens)
    _close("reward", reward, due["tvd_pp"])
    _close("mean", reward.mean(), due["tvd_pp"])
    _close("std", reward.std(unbiased=False), due["tvd_pp"])
    _close("value", losses.tvd_plus_plus(p, q.log(), tokens), due["tvd_pp"])

    smooth = losses.smooth_l1(features, wanted)
    _close("smooth_l1_per_position", smooth, due)
    _close("smooth_l1_masked_mean", losses.masked_mean(smooth, mask), due)
    weights = due["eagle1_weights"]
    _close("eagle1_total", losses.eagle1(features, wanted, p, q.log(), mask, **weights), due)

    vispec = due["vispec"]
    _close("l1", losses.masked_mean(2 * losses.total_variation(p, q), mask), vispec)
    top_k = vispec["rank_topk"]
    _close("rank", losses.masked_mean(losses.list_mle(p, q.log(), top_k), mask), vispec)
    _close("total", losses.vispec(p, q.log(), mask, top_k=top_k), vispec)

    for name, entries, first in (("medusa_weighted", "head_ce", 1), ("eagle3_ttt", "step_losses", 0)):
        parts = [torch.tensor(value, dtype=torch.float64) for value in due[name][entries]]
        _close("total", losses.decayed(parts, due[name]["decay"], first), due[name])


def _close(name: str, got: torch.Tensor, due: dict[str, Any]) -> None:
    wanted = torch.tensor(due[name], dtype=torch.float64)
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    error = (got.double() - wanted).abs().max().item()
    assert error <= 1e-12, f"{name}: off by {error:.3g}"
