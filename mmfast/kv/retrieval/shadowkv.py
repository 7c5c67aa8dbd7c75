"""ShadowKV: chunks of the prompt, found by their mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import PromptReader, by_group, check_count
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice


class Sizes(NamedTuple):
    """How a prompt is cut, and how much of it is read.

    Attributes:
        chunk: entries of a chunk.
        chunks: number of chunks; what follows them is always read.
        outliers: chunks of each head that are always read, because their mean does not stand for them.
        chosen: chunks that a step chooses among the others.
    """

    chunk: int
    chunks: int
    outliers: int
    chosen: int


@register("shadowkv", stage="cache", paper="arXiv 2410.21465", source="bytedance/ShadowKV", vectors=True)
@dataclass(frozen=True)
class ShadowKV(PromptReader):
    """Read the chunks of the prompt whose mean key is attended to most, and those no mean can stand for.

    A chunk is a landmark, the mean of its keys. Chunks with a key far from their landmark are outliers and always
    read, like the end of the prompt; the others compete by the attention of the query over the landmarks, the
    largest among the query heads that share a key/value head. The official code keeps the values of the prompt in
    host memory and its keys as a product of two thin matrices; here what is read is read exactly, and the thin
    matrices are an extra.

    Paper: "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference", ICML 2025.

    Attributes:
        keep: entries of the prompt that each head reads, outliers and the end included, in whole chunks, cut off.
        chunk_size: entries of a chunk; less where ``keep`` is below four chunks.
        outlier_chunks: chunks of each head that are always read.
        local_chunks: chunks at the end, besides what does not fill a chunk, that are always read. Where these and
            the outliers leave room for no other chunk, they get a quarter of the chunks each.
        rank: rank of a copy of the un-rotated keys to keep beside the cache, for readers that move keys away
            (``left`` ``[n, rank]`` and ``right`` ``[G, rank, d]`` in the memory); None for none. The paper: 160.
        compat: ``"official"`` divides the logits over landmarks by the root of 128 whatever the model does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rotation"})

    chunk_size: int = 8
    outlier_chunks: int = 48
    local_chunks: int = 4
    rank: int | None = None
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk_size", self.chunk_size)
        check_count("outlier_chunks", self.outlier_chunks, 0)
        check_count("local_chunks", self.local_chunks, 0)
        if self.rank is not None:
            check_count("rank", self.rank)
        check_choice("compat", self.compat, ["official", None])

    def sizes(self, total: int, kept: int) -> Sizes:
        """Cut a prompt.

        Example:
            >>> ShadowKV().sizes(20000, 2470), ShadowKV().sizes(576, 115)
            (Sizes(chunk=8, chunks=2496, outliers=48, chosen=256), Sizes(chunk=8, chunks=69, outliers=3, chosen=8))
        """
        chunk = min(self.chunk_size, max(1, kept // 4))
        # A chunk of one entry is its own mean: none stands out.
        outliers, local = self.outlier_chunks if chunk > 1 else 0, self.local_chunks
        if (outliers + local + 1) * chunk + total % chunk > kept:
            outliers = min(outliers, kept // chunk // 4)
            local = min(local, kept // chunk // 4)
        chosen = (kept - total % chunk) // chunk - outliers - local
        return Sizes(chunk, total // chunk - local, outliers, chosen)

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the landmarks ``[G, chunks, d]`` and which of them are outliers ``[G, chunks]``."""
        sizes = self.sizes(len(entries), kept)
        marks, outliers = landmarks(entries.keys, sizes.chunk, sizes.chunks, sizes.outliers)
        entries.memory.update(landmarks=marks, outliers=outliers)
        if self.rank is not None:
            bare = entries.keys if entries.rotation is None else entries.rotation.undo(entries.keys)
            left, right = low_rank(bare, self.rank)
            entries.memory.update(left=left, right=right)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return outliers, the end and the best chunks, ``[G, total]``."""
        sizes, marks = self.sizes(total, kept), step.memory["landmarks"]
        if marks.shape[1] != sizes.chunks:
            return None
        scaling = 128**-0.5 if self.compat == "official" else step.scaling
        outliers = step.memory["outliers"]
        chosen = outliers | best_chunks(step.query[:, 0], marks, outliers, sizes.chosen, scaling)
        mask = chosen.repeat_interleave(sizes.chunk, dim=-1)
        return functional.pad(mask, (0, total - mask.shape[-1]), value=True)


def landmarks(keys: Tensor, chunk: int, chunks: int, outliers: int) -> tuple[Tensor, Tensor]:
    """Average the keys of each chunk, and find the chunks that their mean stands for least.

    Args:
        keys: ``[G, n, d]``, rotated.
        chunk: entries of a chunk.
        chunks: number of chunks from the start of the prompt.
        outliers: how many chunks to mark; those whose least similar key has the smallest cosine with the mean.

    Returns:
        float32 ``[G, chunks, d]`` means, and bool ``[G, chunks]``.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> landmarks(keys, 2, 2, 1)[1].tolist()
        [[False, True]]
    """
    grouped = rearrange(keys[:, : chunk * chunks].float(), "g (c s) d -> g c s d", s=chunk)
    means = grouped.mean(dim=2)
    likeness = functional.cosine_similarity(means[:, :, None], grouped, dim=-1).amin(dim=-1)
    return means, top_mask(torch.nan_to_num(-likeness, nan=torch.inf), outliers)


def best_chunks(query: Tensor, marks: Tensor, outliers: Tensor, count: int, scaling: float | None = None) -> Tensor:
    """Mark the chunks whose landmarks a query attends to most.

    Args:
        query: ``[H, d]``.
        marks: ``[G, chunks, d]`` landmarks.
        outliers: bool ``[G, chunks]``, chunks that do not compete.
        count: how many to mark.
        scaling: factor of the logits, ``d ** -0.5`` when None.

    Returns:
        bool ``[G, chunks]``.

    Example:
        >>> marks, outliers = torch.tensor([[[1.0], [3.0], [2.0]]]), torch.tensor([[False, True, False]])
        >>> best_chunks(torch.tensor([[1.0]]), marks, outliers, 1).tolist()
        [[False, False, True]]
    """
    grouped = rearrange(query.float(), "(g r) d -> g r d", g=marks.shape[0])
    logits = grouped @ marks.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    attention = logits.masked_fill(outliers[:, None], -torch.inf).softmax(dim=-1)
    largest = torch.nan_to_num(by_group(attention.flatten(0, 1), len(marks), "max"))
    return top_mask(largest.masked_fill(outliers, -torch.inf), count) & ~outliers


def low_rank(keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Write the keys of all heads together as a product of two thin matrices.

    Args:
        keys: ``[G, n, d]``, un-rotated.
        rank: width of the matrices; no more than n or ``G * d``.

    Returns:
        float32 ``[n, rank]``, shared by the heads, and float32 ``[G, rank, d]``; ``left @ right`` approximates the
        keys best among all products of this rank.

    Example:
        >>> keys = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]])
        >>> left, right = low_rank(keys, 1)
        >>> bool((left @ right).allclose(keys, atol=1e-5))
        True
    """
    together = rearrange(torch.nan_to_num(keys.float(), posinf=0.0, neginf=0.0), "g n d -> n (g d)")
    left, strength, right = torch.linalg.svd(together, full_matrices=False)
    rank = min(rank, strength.numel())
    weighted = strength[:rank, None] * right[:rank]
    return left[:, :rank], rearrange(weighted, "r (g d) -> g r d", g=keys.shape[0])
