"""Calls in which learned parts are trained: tokens are hidden softly instead of dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.attention import Attended, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level
from mmfast.adapters.masks import causal
from mmfast.adapters.reading import switch_on_tap
from mmfast.token_pruning.in_llm.dynamic_llava import policy_softmax
from mmfast.token_pruning.layers import LayerEvent


def refuse_unteachable(adapter: Adapter, inner: Inner) -> None:
    """Refuse calls in which learned parts cannot be trained.

    Raises:
        ValueError: naming the reason and what to do.
    """
    if inner.seen:
        raise ValueError("learned parts are trained on whole sequences; call the model without past_key_values")
    if adapter.decoder.training and getattr(adapter.decoder, "gradient_checkpointing", False):
        raise ValueError(
            "learned parts cannot be trained with gradient checkpointing, which runs layers again when their gates are "
            "gone; call gradient_checkpointing_disable() on the model"
        )


def hide_softly(
    adapter: Adapter, inner: Inner, event: LayerEvent, level: Level, policies: Sequence[tuple[int, Tensor]]
) -> None:
    """Let all layers from an event on attend under policies.

    Args:
        adapter: the adapter of the model.
        inner: the call.
        event: where it begins.
        level: the tokens of the call, K per row.
        policies: rows that have one, each with ``[n]`` weights of its real tokens.
    """
    if not policies:
        return
    batch, length = level.slots.shape
    policy = torch.ones(batch, length, device=policies[0][1].device)
    for row, own in policies:
        real = slice(None) if level.real is None else level.real[row].to(policy.device)
        policy[row, real] = own.float()
    switch_on_tap(adapter, inner)
    listener = SoftlyHidden(policy[..., None])
    for layer in adapter.layers[event.layer :]:
        inner.undo.append(watch(adapter.attention(layer), listener))


class SoftlyHidden:
    """Attend so that gradients reach the decision who is seen.

    Args:
        policy: ``[B, K, 1]``.
    """

    def __init__(self, policy: Tensor) -> None:
        self.policy = policy

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Attended:
        """Attend in float32."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        logits = query.float() @ key.float().transpose(-1, -2) * scaling
        if options.get("softcap"):
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        weights = policy_softmax(_masked(logits, mask), self.policy)
        return Attended(weights.to(value.dtype) @ value)


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask as attention functions take it: none and 2-D ones leave causality to them."""
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return logits + mask.float()
    if mask is None or mask.ndim == 2:
        own = causal(logits.shape[-1], logits.device)
        mask = own if mask is None else own & mask[:, None, None, :].bool()
    return logits.masked_fill(~mask, -torch.inf)
