"""LServe: streaming heads, and pages with finer bounds for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.snapkv import check_window
from mmfast.kv.retrieval.quest import PromptReader, best_pages, by_group, check_count, page_bounds, upper_bounds
from mmfast.kv.retrieval.token_select import shrunken
from mmfast.registry import register


@register("lserve", stage="cache", paper="arXiv 2502.14866", source="mit-han-lab/omniserve")
@dataclass(frozen=True)
class LServe(PromptReader):
    """Let some heads read the ends of the prompt only, and the others its most promising pages.

    A page is worth the best of its sub-pages, each bounded as in ``quest``; pages are chosen anew every few steps.
    The official code takes the streaming heads from a trained gate; here they are those whose last tokens of the
    prompt give most of their attention to the ends of what they see. Only what a step reads is done here, neither
    the sparse prefill nor the quantised storage.

    Paper: "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", MLSys 2025.

    Attributes:
        keep: entries of the prompt that a head reads at most; pages are taken whole, cut off.
        streaming_heads: fraction of the key/value heads that read both ends only, cut off.
        sinks: entries at the start that a streaming head reads.
        local: newest entries that a streaming head reads, those after the prompt included. Both ends shrink in
            proportion where ``keep`` is smaller.
        page_size: entries of a page; at most half of ``keep``.
        parts: sub-pages of a page.
        interval: steps from one choice of pages to the next.
        window: last tokens of the prompt that say which heads are streaming.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    ragged: ClassVar[bool] = True

    streaming_heads: float = 0.5
    sinks: int = 128
    local: int = 256
    page_size: int = 64
    parts: int = 4
    interval: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.streaming_heads, bool) or not 0.0 <= self.streaming_heads <= 1.0:
            raise ValueError(f"streaming_heads={self.streaming_heads!r} must be a fraction in [0, 1]")
        for name in ("sinks", "local"):
            check_count(name, getattr(self, name), 0)
        for name in ("page_size", "parts", "interval"):
            check_count(name, getattr(self, name))
        check_window(self.window)

    def sub_pages(self, kept: int) -> tuple[int, int]:
        """Return the entries of a sub-page and the number of sub-pages of a page.

        Example:
            >>> LServe().sub_pages(4096), LServe().sub_pages(10), LServe().sub_pages(1)
            ((16, 4), (1, 4), (1, 1))
        """
        page = min(self.page_size, max(1, kept // 2))
        parts = min(self.parts, page)
        return page // parts, parts

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the streaming heads ``[G]`` and the bounds of the sub-pages, ``[G, sub-pages, d]``."""
        rows = entries.last_rows(self.window)
        lowest, highest = page_bounds(entries.keys, self.sub_pages(kept)[0])
        sinks, local = shrunken(self.sinks, self.local, kept)
        entries.memory.update(
            streaming=streaming_heads(entries.per_group(rows), sinks, local, self.streaming_heads),
            lowest=lowest,
            highest=highest,
        )

    def read(self, step: Step, total: int, kept: int) -> Tensor:
        """Return the ends for streaming heads and the best pages for the others, ``[G, total]``."""
        sinks, local = shrunken(self.sinks, self.local, kept)
        ends = torch.ones(total, dtype=torch.bool, device=step.keys.device)
        ends[sinks : max(sinks, total - max(0, local - step.added))] = False
        pages = step.memory.get("pages")
        if pages is None or pages.shape[-1] != total or (step.added - 1) % self.interval == 0:
            pages = step.memory["pages"] = self._pages(step, total, kept)
        return torch.where(step.memory["streaming"][:, None], ends, pages)

    def _pages(self, step: Step, total: int, kept: int) -> Tensor:
        size, parts = self.sub_pages(kept)
        lowest, highest = step.memory["lowest"], step.memory["highest"]
        if lowest.shape[1] != -(-total // size):
            # Something evicted entries in between, and the pages are no longer what they were.
            lowest, highest = page_bounds(step.keys[:, :total], size)
        bounds = by_group(upper_bounds(step.query[:, 0], lowest, highest), step.heads, "max")
        scores = best_of_parts(bounds, parts)
        return best_pages(scores, kept // (size * parts), size * parts, total)


def streaming_heads(rows: Tensor, sinks: int, local: int, share: float) -> Tensor:
    """Find the heads that look at both ends of what they see.

    Args:
        rows: ``[G, w, n]``, attention of the last w tokens.
        sinks: entries that belong to the start.
        local: entries that belong to the end: a token itself and those just before it.
        share: fraction of the heads to mark, cut off.

    Returns:
        bool ``[G]``.

    Example:
        >>> streaming_heads(torch.tensor([[[0.1, 0.8, 0.1]], [[0.6, 0.1, 0.3]]]), 1, 1, 0.5).tolist()
        [False, True]
    """
    heads, window, total = rows.shape
    places = torch.arange(total, device=rows.device)
    own = places[total - window :, None]
    ends = (places < sinks) | (places > own - local)
    mass = (rows * ends).sum(dim=(1, 2))
    return top_mask(torch.nan_to_num(mass), int(share * heads))


def best_of_parts(bounds: Tensor, parts: int) -> Tensor:
    """Return the largest bound among each ``parts`` neighbours: ``[..., sub-pages]`` to ``[..., pages]``.

    Example:
        >>> best_of_parts(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
        [3.0, 2.0]
    """
    missing = -bounds.shape[-1] % parts
    filled = functional.pad(bounds, (0, missing), value=-torch.inf)
    return rearrange(filled, "... (p s) -> ... p s", s=parts).amax(dim=-1)
