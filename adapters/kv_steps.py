"""Decode steps on a cache that is read in part or goes on being evicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.attention import Attended, Operands
from mmfast.adapters.call import Block, Inner
from mmfast.adapters.kernel_attention import answered, attend_marked
from mmfast.adapters.masks import hide
from mmfast.kv.base import Retriever
from mmfast.kv.cache import PromptBook
from mmfast.kv.entries import Step


@dataclass(frozen=True, eq=False)
class Steps:
    """A decode step in one layer, of which methods are shown one prompt at a time.

    Attributes:
        cached: the cache layer, its new entries among what it has stored.
        index: of the layer.
        depth: number of layers.
        query: ``[B, H, q, d]``; q is more than 1 where tokens are drafted.
        key: ``[B, G, P, d]`` everything stored.
        value: ``[B, G, P, d]``.
        options: keywords of the attention function.
    """

    cached: Any
    index: int
    depth: int
    query: Tensor
    key: Tensor
    value: Tensor
    options: Mapping[str, Any]

    def of(self, row: int) -> tuple[Tensor, Step]:
        """Describe the step of one prompt.

        Returns:
            ``[n]`` int64 places of what the prompt has stored, and the step.
        """
        book = self.cached.prompts[row]
        return self._seeing(row, self.query, self.cached.real_entries()[row], self.cached.seen - book.end, book.memory)

    def drafted(self, row: int, token: int, block: Block) -> tuple[Tensor, Step]:
        """Describe the step of one drafted token, as if those on its path had been generated one by one.

        What the method remembers of it is the last of the trail of the prompt's book.

        Returns:
            As :meth:`of`.
        """
        book, past = self.cached.prompts[row], self.key.shape[2] - self.query.shape[2]
        shown = self.cached.real_entries()[row].clone()
        shown[:, past:] &= block.visible()[row, token]
        added = int(block.lengths[row]) + int(block.depth[row, token]) + 1 - book.end
        return self._seeing(row, self.query[:, :, token : token + 1], shown, added, book.trail[token])

    def _seeing(
        self, row: int, query: Tensor, real: Tensor, added: int, memory: dict[str, Tensor]
    ) -> tuple[Tensor, Step]:
        """Describe a step that sees the entries ``real`` ``[G, P]`` after ``added`` tokens since the prompt."""
        keys, values = self.key[row], self.value[row]
        places = real.any(dim=0).nonzero().squeeze(-1)
        if places.numel() < keys.shape[1]:
            keys, values, real = keys[:, places], values[:, places], real[:, places]
        return places, Step(
            keys,
            values,
            query[row],
            self.cached.prompts[row].entries + added,
            added,
            self.index,
            self.depth,
            None if self.cached.heads is None else real,
            self.options.get("scaling"),
            self.options.get("softcap"),
            memory,
        )


class Selecting:
    """Let a decode step attend to what a method chooses.

    Args:
        method: it.
        inner: the call.
        index: of the layer.
        depth: number of layers.
    """

    def __init__(self, method: Retriever, inner: Inner, index: int, depth: int) -> None:
        self.method, self.inner, self.index, self.depth = method, inner, index, depth

    def take(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Operands | Attended | None:
        """Choose row by row, and read that alone."""
        cached = self.inner.cache.layers[self.index]
        if cached.prompts is None:
            return None
        steps = Steps(cached, self.index, self.depth, query, key, value, options)
        if self.inner.block is not None:
            return self._take_block(self.inner.block, steps, mask)
        if query.shape[2] != 1:
            return None
        chosen = self._choose(steps)
        if answered(self.inner, self.index):
            kept = cached.real_entries() if chosen is None else chosen
            return attend_marked(query, key, value, mask, options, kept=kept, bias=cached.bias)
        return None if chosen is None else _narrowed(key, value, mask, chosen, weighted=cached.bias is not None)

    def _choose(self, steps: Steps) -> Tensor | None:
        """Return which entries each query head reads, bool ``[B, H, P]``; None where all read everything."""
        query_heads, changed = steps.query.shape[1], False
        chosen = steps.cached.real_entries().repeat_interleave(query_heads // steps.key.shape[1], dim=1).clone()
        with torch.no_grad():
            for row, book in enumerate(steps.cached.prompts):
                if book is None:
                    continue
                places, step = steps.of(row)
                picked = self.method.choose(step)
                if picked is not None:
                    changed = True
                    chosen[row][:, places] &= _by_query_head(picked, query_heads)
        return chosen if changed else None

    def _take_block(self, block: Block, steps: Steps, mask: Any) -> Operands | None:
        """Choose for every drafted token as if those on its path had been generated one by one."""
        cached, key, value = steps.cached, steps.key, steps.value
        tokens, stored, query_heads = steps.query.shape[2], key.shape[2], steps.query.shape[1]
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
                    places, step = steps.drafted(row, token, block)
                    picked = self.method.choose(step)
                    if picked is not None:
                        changed = True
                        chosen[row, :, token, places] &= _by_query_head(picked, query_heads)
        if not changed:
            return None
        if cached.bias is not None or (mask is not None and mask.ndim == 4):
            base = mask[..., -stored:].expand(*chosen.shape[:2], -1, -1)
            return key, value, hide(base, ~chosen)
        return key, value, chosen


def _by_query_head(picked: Tensor, query_heads: int) -> Tensor:
    """Write out what a method chose for each query head, bool ``[H, P]``; the new entry is always read."""
    picked = picked.clone() if picked.ndim == 2 else picked[None].clone()
    picked[:, -1] = True
    return picked.repeat_interleave(query_heads // picked.shape[0], dim=0)


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
