"""PyramidDrop: one stage, from the hidden states before it to the shortened batch after it."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmfast.adapters.call import compact_positions
from mmfast.budget import average_of
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.pyramiddrop import PyramidDrop
from mmfast.token_pruning.layers import LayerEvent, LayerTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare scores, choices, features, compact positions and padding of each sample."""
    hidden = torch.from_numpy(case["features"])
    stage, ratios = int(case["stage"]), case["ratio_list"].tolist()
    # Which layers the stages lie at is not part of the vectors.
    depth, layers = len(ratios), tuple(range(1, len(ratios)))
    keep = average_of(ratios[1:], layers, depth)
    method = PyramidDrop(keep=keep, layers=layers, fractions=tuple(ratios[1:]), positions="compact")
    event = method.events(depth)[stage]
    with_image = 0
    for row, states in enumerate(hidden):
        real = torch.from_numpy(case["attention_mask"])[row].bool()
        states, full = states[real], int(case["image_tokens_full"][row])
        kept = torch.arange(states.shape[0])
        if full:
            kept = _stage(case, method, event, states, row, with_image, int(full * ratios[stage]))
            with_image += 1
        count = kept.numel()
        np.testing.assert_allclose(states[kept].numpy(), case["out_features"][row, :count], rtol=1e-4, atol=1e-5)
        positions = compact_positions(kept[None], None, torch.tensor([0]))[0]
        np.testing.assert_array_equal(positions.numpy(), case["out_position_ids"][row, :count])
        if not bool(case["mask_was_none"]):
            expected = np.arange(case["out_attention_mask"].shape[1]) < count
            np.testing.assert_array_equal(case["out_attention_mask"][row].astype(bool), expected)


def _stage(
    case: dict[str, np.ndarray],
    method: PyramidDrop,
    event: LayerEvent,
    states: Tensor,
    row: int,
    number: int,
    alive: int,
) -> Tensor:
    start = int(case["image_pos"][row])
    candidates = torch.arange(start, start + alive)
    heads = int(case["num_heads"])
    positions = torch.from_numpy(case["position_ids"])[row, : states.shape[0]]
    normed = _rms_norm(states, torch.from_numpy(case["ln_weight"]), float(case["ln_eps"]))
    query, key = (
        _rotate(
            rearrange(normed @ torch.from_numpy(case[name]).T, "n (h d) -> h n d", h=heads),
            positions,
            float(case["rope_theta"]),
        )
        for name in ("q_weight", "k_weight")
    )
    last = int(case["prompt_len"][row]) + alive - 1
    tokens = LayerTokens(
        hidden=states,
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=int(case["image_tokens_full"][row]),
        media_totals=(int(case["image_tokens_full"][row]),),
        last=last,
        attention=AttentionView(query, key),
    )
    score = method.score(tokens, event)
    np.testing.assert_allclose(score.numpy(), case[f"score_{number}"], rtol=1e-4, atol=1e-5)
    decision = method(tokens, event)
    chosen = candidates if decision is None else candidates[decision.indices]
    assert chosen.numel() == int(case[f"k_{number}"])
    np.testing.assert_array_equal((chosen - start).numpy(), case[f"topk_sorted_local_{number}"])
    text = torch.tensor([place for place in range(states.shape[0]) if not start <= place < start + alive])
    return torch.cat([chosen, text]).sort().values


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = states.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
