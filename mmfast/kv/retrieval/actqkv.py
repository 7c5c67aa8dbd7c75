"""ActQKV: blocks found by a query that weighs unusual tokens more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.snapkv import check_window
from mmfast.kv.retrieval.quest import PromptReader, best_pages, by_group, check_count, padded
from mmfast.kv.retrieval.token_select import fitting_ends
from mmfast.registry import register


@register("actqkv", stage="cache", paper="arXiv 2502.13542", source="MrXiaoaa/ActQKV")
@dataclass(frozen=True)
class ActQKV(PromptReader):
    """Read the blocks whose most attended keys point where the unusual ones among the last queries do.

    The probe is a mean of the last queries, the new one included, each weighted by how far it is from their mean.
    A block is worth the mean cosine of the probe with its representatives, the keys that the end of the prompt
    attends to most; all heads read the same blocks. Where few blocks stand out, a layer reads fewer: the entropy of
    the scores over the largest possible one is the share of the budget it uses. The paper compares it with what the
    layers still to come are expected to need, which no layer knows here.

    Paper: "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference".

    Attributes:
        keep: entries of the prompt to read at most, both ends included.
        first: entries at the start of the prompt that are always read.
        local: entries at its end that are always read. Where both ends leave no room between them, they share
            half of it.
        block_size: entries of a block; less where the room is smaller.
        representatives: keys that stand for a block.
        window: last queries that make up the probe.
        by_entropy: whether the entropy decides how many blocks are read; otherwise always as many as fit.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    first: int = 64
    local: int = 512
    block_size: int = 32
    representatives: int = 4
    window: int = 32
    by_entropy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first", self.first, 0)
        check_count("local", self.local, 0)
        check_count("block_size", self.block_size)
        check_count("representatives", self.representatives)
        check_window(self.window)

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the last queries ``[H, w, d]`` and the representatives ``[G, B, r, d]``, of length one."""
        first, local = fitting_ends(self.first, self.local, kept)
        between = slice(first, len(entries) - local)
        block = min(self.block_size, kept - first - local)
        attended = entries.per_group(entries.last_rows(self.window).mean(dim=1))[:, between]
        chosen = representatives(entries.keys[:, between], attended, block, min(self.representatives, block))
        entries.memory.update(
            representatives=functional.normalize(chosen, dim=-1),
            queries=entries.view.query[:, -self.window :].clone(),
        )

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return both ends and the best blocks, ``[total]``."""
        chosen = step.memory["representatives"]
        queries = torch.cat([step.memory["queries"], step.query], dim=1)[:, -self.window :]
        step.memory["queries"] = queries
        first, local = fitting_ends(self.first, self.local, kept)
        room, between = kept - first - local, total - first - local
        block = min(self.block_size, room)
        if chosen.shape[1] != -(-between // block):
            return None
        probe = functional.normalize(by_group(probe_query(queries), step.heads, "mean"), dim=-1)
        scores = torch.nan_to_num(torch.einsum("gd,gbrd->gbr", probe, chosen).mean(dim=(0, 2)))
        share = spread(scores) if self.by_entropy else 1.0
        count = max(1, min(room // block, round(share * room / block)))
        middle = best_pages(scores, count, block, between)
        return functional.pad(middle, (first, local), value=True)


def probe_query(queries: Tensor) -> Tensor:
    """Average queries, the more weight the further one is from their mean.

    The weight of a token is its squared distance from the mean, each channel in units of its variance (and a
    hundredth of the mean variance, lest a constant channel divide by zero).

    Args:
        queries: ``[H, w, d]``.

    Returns:
        float32 ``[H, d]``; the mean where all are the same.

    Example:
        >>> round(probe_query(torch.tensor([[[1.0], [1.0], [4.0]]])).item(), 4)
        3.0
    """
    states = rearrange(queries.float(), "h w d -> w (h d)")
    variance = states.var(dim=0, unbiased=False)
    distance = (states - states.mean(dim=0)).square() / (variance + variance.mean() / 100)
    weight = torch.nan_to_num(distance).sum(dim=-1)
    total = weight.sum()
    weight = torch.where(total > 0, weight / total, 1 / len(weight))
    return torch.einsum("w,hwd->hd", weight, queries.float())


def representatives(keys: Tensor, attended: Tensor, block: int, count: int) -> Tensor:
    """Take the most attended keys of each block.

    Args:
        keys: ``[G, n, d]``.
        attended: ``[G, n]``.
        block: entries of a block; a shorter last one is filled up with its last key.
        count: keys of a block, at most ``block``.

    Returns:
        float32 ``[G, blocks, count, d]``.

    Example:
        >>> keys, attended = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0.1, 0.5, 0.2]])
        >>> representatives(keys, attended, 2, 1).flatten().tolist()
        [2.0, 3.0]
    """
    scores = rearrange(padded(attended[..., None], block), "g (b s) 1 -> g b s", s=block)
    places = torch.nan_to_num(scores).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    blocks = rearrange(padded(keys, block).float(), "g (b s) d -> g b s d", s=block)
    return blocks.gather(2, repeat(places, "g b r -> g b r d", d=keys.shape[-1]))


def spread(scores: Tensor) -> float:
    """Say how evenly scores ``[B]`` are spread: entropy over the largest possible one, between 0 and 1.

    They are brought to the range from 0 to 1 and put through a softmax first.

    Example:
        >>> spread(torch.tensor([0.3, 0.3])), spread(torch.tensor([0.3]))
        (1.0, 1.0)
        >>> spread(torch.tensor([0.3, 0.0, 0.0])) < 1
        True
    """
    if scores.numel() < 2:
        return 1.0
    span = scores.max() - scores.min()
    weights = torch.where(span > 0, (scores - scores.min()) / span, 0.0).softmax(dim=0)
    entropy = -(weights * weights.log()).sum() / torch.tensor(float(len(scores))).log()
    return min(1.0, float(entropy))
