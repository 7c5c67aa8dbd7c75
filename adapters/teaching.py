"""Calls in training: tokens are hidden softly instead of dropped, and who looks at what is noted for a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.attention import Attended, Capture, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level
from mmfast.adapters.masks import causal
from mmfast.adapters.reading import switch_on_tap
from mmfast.token_pruning.compression_base import own_parts
from mmfast.token_pruning.in_llm.dynamic_llava import policy_softmax
from mmfast.token_pruning.layers import LayerEvent
from mmfast.token_pruning.weights import Lesson


def refuse_unteachable(adapter: Adapter, inner: Inner) -> None:
    """Refuse calls in which a plan cannot be trained.

    Raises:
        ValueError: naming the reason and what to do.
    """
    if inner.seen:
        raise ValueError("a plan is trained on whole sequences; call the model without past_key_values")
    if adapter.decoder.training and getattr(adapter.decoder, "gradient_checkpointing", False):
        raise ValueError(
            "a plan cannot be trained with gradient checkpointing, which runs layers again when what the plan does "
            "there is gone; call gradient_checkpointing_disable() on the model"
        )


def watch_parts(adapter: Adapter, inner: Inner) -> None:
    """Note for the lesson of a call how far compression tokens look at their own parts of what they read.

    Raises:
        ValueError: if the call cannot be taught.
    """
    lesson, found = inner.lesson, inner.tables.get("hidden")
    if lesson is None or not lesson.parts or not found:
        return
    refuse_unteachable(adapter, inner)
    level, marked = inner.levels[0], inner.tables["marked"]
    watched: list[_Watched] = []
    for row, parts in enumerate(found):
        alive = torch.arange(level.length) if level.real is None else level.real[row].cpu().nonzero().flatten()
        own = level.slots[row].cpu()[alive]
        begin = 0
        for one in parts:
            tokens = own[marked[row, own] & (own >= begin) & (own < one.start)]
            read = [part for part in inner.segments[row] if bool(torch.isin(part.slots.cpu(), one.places).any())]
            shown = torch.cat([part.slots.cpu() for part in read])
            there = torch.isin(shown, own)
            mine = own_parts([part.layout for part in read], tokens.numel())[:, there]
            filled = mine.any(dim=1)
            asking, shown = torch.searchsorted(own, tokens[filled]), torch.searchsorted(own, shown[there])
            watched.append(_Watched(row, alive, asking, shown, mine[filled]))
            begin = one.start
    switch_on_tap(adapter, inner)
    for layer in adapter.layers[: lesson.parts]:
        inner.undo.append(watch(adapter.attention(layer), _PartListener(lesson, level, watched)))


@dataclass(frozen=True)
class _Watched:
    """A run of n compression tokens in one row.

    Attributes:
        row: of the batch.
        alive: ``[m]`` int64, which tokens of the call belong to the prompt.
        tokens: ``[n]`` int64, those of the run whose part is not empty; counted among those alive, as ``places``.
        places: ``[N]`` int64, the visual tokens it reads.
        mine: ``[n, N]`` bool, the part of each.
    """

    row: int
    alive: Tensor
    tokens: Tensor
    places: Tensor
    mine: Tensor


class _PartListener:
    def __init__(self, lesson: Lesson, level: Level, watched: Sequence[_Watched]) -> None:
        self.lesson, self.level, self.watched = lesson, level, watched

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
        """Note the attention ``[H, n]`` of each run to its parts."""
        capture = Capture(self.level.slots, real=self.level.real, attached=True)
        capture.take(query, key, value, mask, options)
        for one in self.watched:
            view = capture.view(one.row, one.alive)
            seen = view.logits(one.tokens.to(query.device)).softmax(dim=-1)[..., one.places.to(query.device)]
            self.lesson.note("own_part", (seen * one.mine.to(query.device)).sum(dim=-1))


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
