"""Before the decoder: let a method choose among the visual tokens, and number those that enter."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.adapters.call import Inner
from mmfast.adapters.media import Segment
from mmfast.token_pruning.base import BeforeLLM, Merger
from mmfast.tokens import Keep, Layout, VisualTokens


def reduce_media(method: BeforeLLM, inner: Inner, embeds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Ask a method about each image and video.

    Args:
        method: the method of the stage.
        inner: the call, with its segments.
        embeds: ``[B, S, D]`` embeddings, visual features in place.
        valid: ``[B, S]`` bool, False for padding.

    Returns:
        ``[B, S]`` bool of what stays, the embeddings with merged features in place, and whether
        anything was dropped or merged.
    """
    keep, embeddings, changed = valid.clone(), embeds, False
    for row, parts in enumerate(inner.segments):
        signals = _signals(method, embeds, valid, inner, row)
        for index, part in enumerate(parts):
            slots = part.slots.to(embeds.device)
            merging = isinstance(method, Merger)
            features = embeds[row, slots] if merging else embeds[row, slots].detach()
            with torch.set_grad_enabled(merging and torch.is_grad_enabled()):
                decision = method(VisualTokens(features, part.layout, index, signals))
            if decision is None:
                continue
            changed = True
            keep[row, slots] = False
            keep[row, slots[decision.indices]] = True
            if decision.features is not None:
                embeddings = _overwrite(embeddings, row, slots, decision)
            if decision.sizes is not None:
                if inner.sizes is None:
                    inner.sizes = torch.ones(valid.shape, device=embeds.device)
                inner.sizes[row, slots[decision.indices]] = decision.sizes.to(embeds.device)
    return keep, embeddings, changed


def number_candidates(inner: Inner, keep: Tensor) -> None:
    """Number the tokens that layers may drop; newline tokens are none of them."""
    batch, length = keep.shape
    inner.candidate = torch.zeros(batch, length, dtype=torch.bool)
    inner.number = torch.zeros(batch, length, dtype=torch.int64)
    inner.media = torch.zeros(batch, length, dtype=torch.int64)
    entering = keep.cpu()
    for row, parts in enumerate(inner.segments):
        totals: list[int] = []
        layouts: list[Layout] = []
        for index, part in enumerate(parts):
            slots = part.slots.cpu()
            enters = entering[row, slots] & ~part.layout.is_newline
            slots = slots[enters]
            layouts.append(part.layout.take(enters))
            inner.candidate[row, slots] = True
            inner.media[row, slots] = index
            inner.number[row, slots] = torch.arange(slots.numel()) + sum(totals)
            totals.append(int(slots.numel()))
        inner.media_totals.append(tuple(totals))
        inner.layouts.append(tuple(layouts))
        inner.memory.append({})


def _signals(method: BeforeLLM, embeds: Tensor, valid: Tensor, inner: Inner, row: int) -> dict[str, Tensor]:
    if "text_embeds" not in method.needs:
        return {}
    text = valid[row].clone()
    for part in inner.segments[row]:
        text[part.slots.to(text.device)] = False
    return {"text_embeds": embeds[row, text].detach()}


def _overwrite(embeddings: Tensor, row: int, slots: Tensor, decision: Keep) -> Tensor:
    """Put merged features into the slots that stay; rows of NaN mark slots left as they are."""
    features = decision.features
    if features is None:
        return embeddings
    merged = ~features[:, 0].isnan()
    places = slots[decision.indices[merged]]
    rows = torch.full_like(places, row)
    return embeddings.index_put((rows, places), features[merged].to(embeddings.dtype))


def slot_signals(parts: list[Segment], slots: Tensor) -> dict[str, Tensor]:
    """Collect the signals of the vision encoder for some slots of one prompt.

    Args:
        parts: the images and videos of the prompt.
        slots: ``[V]`` int64, ascending places of visual tokens, on the CPU.
    """
    return {}
