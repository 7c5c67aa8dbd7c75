"""MustDrop inside the language model: one filter step, and a whole prefill with its caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.adapters.call import Level, compact_positions
from mmfast.adapters.layers import LayerRunner
from mmfast.token_pruning.in_llm.mustdrop import MustDrop, text_attention, threshold_margin
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Compare sums, largest entries and survivors, or everything a prefill leaves behind."""
    if "kept_local_index" in case:
        _filter(case)
    else:
        _prefill(case)


def _tokens(attention: np.ndarray, candidates: Tensor, origin: Tensor, total: int, **more: Any) -> LayerTokens:
    return LayerTokens(
        hidden=torch.zeros(attention.shape[-1], 1),
        candidates=candidates,
        origin=origin,
        media=torch.zeros_like(origin),
        total=total,
        media_totals=(total,),
        attention=DenseAttention.of(torch.from_numpy(attention)[0]),
        **more,
    )


def _thresholds(case: dict[str, np.ndarray]) -> tuple[float, float]:
    return float(case["global_thr"]), float(case["individual_thr"])


def _filter(case: dict[str, np.ndarray]) -> None:
    start, total = int(case["image_start"]), int(case["image_len"])
    candidates = torch.arange(start, start + total)
    tokens = _tokens(case["attention"], candidates, candidates - start, total)
    sums, largest = text_attention(tokens.view(), tokens.question, candidates)
    np.testing.assert_allclose(sums.numpy(), case["global_sum"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(largest.numpy(), case["individual_max"], rtol=1e-4, atol=1e-5)
    survivors = (threshold_margin(sums, largest, *_thresholds(case)) >= 1.0).nonzero().squeeze(-1)
    np.testing.assert_array_equal(survivors.numpy(), case["kept_local_index"])
    if survivors.numel():
        decision = _method(case, key_share=0.0)(tokens, LayerEvent(3, 0, 32))
        kept = torch.arange(total) if decision is None else decision.indices
        np.testing.assert_array_equal(kept.numpy(), case["kept_local_index"])


def _method(case: dict[str, np.ndarray], **options: Any) -> MustDrop:
    global_threshold, individual_threshold = _thresholds(case)
    return MustDrop(keep=None, global_threshold=global_threshold, individual_threshold=individual_threshold, **options)


def _prefill(case: dict[str, np.ndarray]) -> None:
    start, total = int(case["image_start"]), int(case["image_len"])
    hidden = torch.from_numpy(case["hidden_states"])[0]
    key = torch.zeros(total)
    key[torch.from_numpy(case["key_set"])] = 1.0
    # As many tokens as there are given, whatever share that is.
    method = _method(
        case,
        key_share=max(0.0, len(case["key_set"]) - 0.5) / total,
        positions="compact",
        truncate_cache=True,
    )
    depth = len(case["tokens_per_layer"])
    events = {event.layer: event for event in method.events(depth)}
    slots, memory = torch.arange(hidden.shape[0]), {}
    levels: list[Level] = []
    for layer in range(depth):
        if layer in events:
            candidates = ((slots >= start) & (slots < start + total)).nonzero().squeeze(-1)
            origin = slots[candidates] - start
            signals = {"cls_attention": key[origin]}
            tokens = _tokens(case[f"attn_{layer - 1}"], candidates, origin, total, memory=memory, signals=signals)
            decision = method(tokens, events[layer])
            if decision is not None:
                stays = torch.ones_like(slots, dtype=torch.bool)
                stays[candidates] = False
                stays[candidates[decision.indices]] = True
                slots = slots[stays]
            np.testing.assert_allclose(hidden[slots].numpy(), case[f"hidden_in_{layer}"][0], rtol=1e-4, atol=1e-5)
        levels.append(Level(slots[None], None))
    np.testing.assert_array_equal([level.length for level in levels], case["tokens_per_layer"])
    np.testing.assert_allclose(hidden[slots].numpy(), case["hidden_last_in"][0], rtol=1e-4, atol=1e-5)
    positions = compact_positions(slots[None], None, torch.tensor([0]))[0]
    np.testing.assert_array_equal(positions.numpy(), case["position_ids_last"])
    _caches(case, method, levels)


class _CacheLayer:
    """What a layer's cache holds, as slots of what entered the layer."""

    def __init__(self, stored: int) -> None:
        self.stored, self.slots = stored, torch.arange(stored)

    def narrow(self, indices: Tensor, real: Tensor | None) -> None:
        assert real is None
        self.slots = self.slots[indices[0]]


def _caches(case: dict[str, np.ndarray], method: MustDrop, levels: list[Level]) -> None:
    """Let the runner cut the caches after the prefill.

    The array ``output_attentions_flag`` says which layers the official code slows down; nothing here answers to it.
    """
    depth = len(levels)
    layers = [_CacheLayer(level.length) for level in levels]
    runner: Any = SimpleNamespace(dropper=method, adapter=SimpleNamespace(shape=SimpleNamespace(layers=depth)))
    inner: Any = SimpleNamespace(
        cache=SimpleNamespace(layers=layers), events=method.events(depth), level_at=levels.__getitem__, tables={}
    )
    LayerRunner.truncate(runner, inner)
    np.testing.assert_array_equal([layer.slots.numel() for layer in layers], case["cache_len_after"])
    for event in method.events(depth):
        name = event.layer - 1
        np.testing.assert_array_equal(layers[name].slots.numpy(), case[f"cache_slots_{name}"])
