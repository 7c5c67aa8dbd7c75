"""Decode steps on a cache that is read in part or goes on being evicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.attention import Operands
from mmfast.adapters.call import Block, Inner
from mmfast.adapters.masks import hide
from mmfast.kv.base import Retriever
from mmfast.kv.cache import PromptBook
from mmfast.kv.entries import Step


class Selecting:
    """Let a decode step attend to what a method chooses."""

    def __init__(self, method: Retriever, inner: Inner, index: int, depth: int) -> None:
        self.method, self.inner, self.index, self.depth = method, inner, index, depth

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Operands | None:
        """Choose row by row; where all rows and heads read equally much, gather it."""
        cached = self.inner.cache.layers[self.index]
        if cached.prompts is None:
            return None
        if self.inner.block is not None:
            return self._take_block(self.inner.block, query, key, value, mask, options)
        if query.shape[2] != 1:
            return None
        heads = key.shape[1]
        query_heads = query.shape[1]
        real = cached.real_entries()
        chosen = real.repeat_interleave(query_heads // heads, dim=1).clone()
        changed = False
        with torch.no_grad():
            for row, book in enumerate(cached.prompts):
                if book is None:
                    continue
                places, step = step_of(cached, self.index, self.depth, row, query, options, key, value)
                picked = self.method.choose(step)
                if picked is None:
                    continue
                changed = True
                picked = picked.clone() if picked.ndim == 2 else picked[None].clone()
                picked[:, -1] = True
                chosen[row][:, places] &= picked.repeat_interleave(query_heads // picked.shape[0], dim=0)
        if not changed:
            return None
        return _narrowed(key, value, mask, chosen, weighted=cached.bias is not None)

    def _take_block(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Operands | None:
        """Choose for every drafted token as if those on its path had been generated one by one."""
        cached = self.inner.cache.layers[self.index]
        tokens, stored, query_heads = query.shape[2], key.shape[2], query.shape[1]
        past = stored - tokens
        sees = block.visible()
        real = cached.real_entries()
        own = real[:, :, None, past:] & sees[:, None]
        chosen = torch.cat([real[:, :, None, :past].expand(-1, -1, tokens, -1), own], dim=-1)
        chosen = chosen.repeat_interleave(query_heads // key.shape[1], dim=1)
        changed = False
        with torch.no_grad():
            for row, book in enumerate(cached.prompts):
                if book is None:
                    continue
                book.trail = []
                for token in range(tokens):
                    before = sees[row, token, :token].nonzero().flatten().tolist()
                    book.trail.append(dict(book.trail[before[-1]] if before else book.memory))
                    if not bool(real[row, :, past + token].any()):
                        # Padding of a row with a shorter draft.
                        continue
                    shown = real[row].clone()
                    shown[:, past:] &= sees[row, token]
                    added = int(block.lengths[row]) + int(block.depth[row, token]) + 1 - book.end
                    places, step = _step(
                        cached, self.index, self.depth, row, query[:, :, token : token + 1], options, key, value,
                        shown, added, book.trail[token],
                    )  # fmt: skip
                    picked = self.method.choose(step)
                    if picked is None:
                        continue
                    changed = True
                    picked = picked.clone() if picked.ndim == 2 else picked[None].clone()
                    picked[:, -1] = True
                    wide = picked.repeat_interleave(query_heads // picked.shape[0], dim=0)
                    chosen[row, :, token, places] &= wide
        if not changed:
            return None
        if cached.bias is not None or (mask is not None and mask.ndim == 4):
            base = mask[..., -stored:].expand(*chosen.shape[:2], -1, -1)
            return key, value, hide(base, ~chosen)
        return key, value, chosen


def step_of(
    cached: Any,
    index: int,
    depth: int,
    row: int,
    query: Tensor,
    options: Mapping[str, Any],
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Step]:
    """Describe one decode step of one prompt in one layer.

    Returns:
        ``[P]`` int64 places of what the prompt has stored, and the step.
    """
    book = cached.prompts[row]
    real, added = cached.real_entries()[row], cached.seen - book.end
    return _step(cached, index, depth, row, query, options, key, value, real, added, book.memory)


def _step(
    cached: Any,
    index: int,
    depth: int,
    row: int,
    query: Tensor,
    options: Mapping[str, Any],
    key: Tensor,
    value: Tensor,
    real: Tensor,
    added: int,
    memory: dict[str, Tensor],
) -> tuple[Tensor, Step]:
    """Describe a step that sees the entries ``real`` ``[G, P]`` after ``added`` tokens since the prompt."""
    keys, values = key[row], value[row]
    places = real.any(dim=0).nonzero().squeeze(-1)
    if places.numel() < keys.shape[1]:
        keys, values, real = keys[:, places], values[:, places], real[:, places]
    return places, Step(
        keys,
        values,
        query[row],
        cached.prompts[row].entries + added,
        added,
        index,
        depth,
        None if cached.heads is None else real,
        options.get("scaling"),
        options.get("softcap"),
        memory,
    )


def _narrowed(key: Tensor, value: Tensor, mask: Any, chosen: Tensor, *, weighted: bool) -> Operands:
    """Gather what is read where that is equally much everywhere, else hide the rest.

    Args:
        key: ``[B, G, P, d]``.
        value: ``[B, G, P, d]``.
        mask: of the attention function.
        chosen: ``[B, H, P]`` bool.
        weighted: the mask gives entries weights, so that it cannot be left out.
    """
    batch, query_heads, stored = chosen.shape
    heads = key.shape[1]
    by_group = chosen.unflatten(1, (heads, query_heads // heads))
    counts = chosen.sum(dim=-1)
    even = bool((counts == counts[0, 0]).all()) and bool((by_group == by_group[:, :, :1]).all())
    if even and not weighted:
        kept = by_group[:, :, 0]
        order = kept.nonzero()[:, 2].view(batch, heads, -1)
        wide = order[..., None].expand(-1, -1, -1, key.shape[-1])
        return key.gather(2, wide), value.gather(2, wide), None
    visible = chosen[:, :, None, :]
    if mask is None:
        return key, value, visible
    if mask.ndim == 2:
        return key, value, visible & mask[:, None, None, -stored:].bool()
    own = mask[..., -stored:].expand(batch, query_heads, -1, -1)
    value_hidden = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
    return key, value, own.masked_fill(~visible, value_hidden)


def gather_memory(book: PromptBook, keep: Tensor) -> None:
    """Let the books of a method follow what was evicted; they have one value per stored entry.

    Args:
        book: of one prompt.
        keep: bool ``[G, P]``.
    """
    stored = keep.shape[-1]
    longest = int(keep.sum(dim=-1).max())
    order = keep.to(torch.int8).sort(dim=-1, stable=True).indices[:, stored - longest :]
    for name, tensor in book.memory.items():
        if tensor.ndim == 0 or tensor.shape[-1] != stored:
            continue
        own = order if tensor.ndim > 1 else order[0]
        book.memory[name] = tensor.gather(-1, own.expand(*tensor.shape[:-1], -1) if tensor.ndim > 1 else own)
