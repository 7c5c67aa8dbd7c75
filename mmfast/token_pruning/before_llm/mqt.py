"""Matryoshka query transformer: an ordered set of learned queries, of which the first few are asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfast.registry import register
from mmfast.token_pruning.projector_base import (
    LearnedMerger,
    check_heads,
    check_positive,
    grid_or_row,
    query_keep,
    resized_table,
    small_start,
    square_table,
)
from mmfast.tokens import Keep, VisualTokens


@register("mqt", stage="before_llm", paper="arXiv 2405.19315", source="gordonhu608/MQT-LLaVA", training_free=False)
@dataclass(frozen=True)
class Mqt(LearnedMerger):
    """Let the first ``keep`` of a set of learned queries read each image, in the place of the projector.

    Trained with another number of queries in each step, one set of weights serves at any number: the first queries
    learn what matters most. (The paper trains all 256 first, then an even number drawn for each step; see
    ``recipes/matryoshka.toml``.) Without ``weights`` the queries are random (mechanics only).

    Weights: the state dict of :class:`MqtResampler`, whose names are those of the official code.

    Paper: "Matryoshka Query Transformer for Large Vision-Language Models", NeurIPS 2024.

    Attributes:
        keep: how many queries are asked; int = count per image, float = fraction of its tokens.
        queries: how many there are, a square number.
        heads: attention heads; the official code has 16.
        official_keys: look up by position alone, as the released code does, so that where a query looks does not
            depend on the image. For weights that were trained so.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    keep: int | float | None = 64
    queries: int = 256
    heads: int = 16
    official_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(queries=self.queries, heads=self.heads)
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(f"queries={self.queries} must be a square number: they have places in a square grid")
        if not isinstance(self.official_keys, bool):
            raise ValueError(f"official_keys={self.official_keys!r} must be True or False")

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Ask the first queries.

        Raises:
            ValueError: if there are not enough of them.
        """
        if kept > self.queries:
            raise ValueError(f"keep leaves {kept} tokens per image or tile, but there are queries={self.queries} only")
        read = tokens.signals.get("patch_features", tokens.features)
        sizes = (read.shape[-1], tokens.features.shape[-1], self.queries, self.heads)
        module = self.part(tokens, MqtResampler, *sizes)
        found = module(read.float()[None], grid_or_row(tokens), kept, official_keys=self.official_keys)[0]
        return query_keep(len(tokens), found.to(tokens.features.dtype))


class MqtResampler(nn.Module):
    """Learned queries with places in a square grid, one cross-attention and a projection.

    Args:
        width: of the features, Dv; a multiple of 4 and of ``heads``.
        out: width of the embeddings, D.
        queries: number of queries, a square.
        heads: attention heads.

    Example:
        >>> module = MqtResampler(8, 12, queries=16, heads=2)
        >>> module(torch.randn(1, 6, 8), (2, 3), 5).shape
        torch.Size([1, 5, 12])
    """

    pos_embed: Tensor

    def __init__(self, width: int, out: int, queries: int = 256, heads: int = 16) -> None:
        super().__init__()
        check_heads(heads, width)
        self.register_buffer("pos_embed", square_table(math.isqrt(queries), width))
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_k = nn.LayerNorm(width, eps=1e-6)
        self.ln_v = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(out**-0.5 * torch.randn(width, out))
        small_start(self)

    def forward(
        self, features: Tensor, grid: tuple[int, int], count: int | None = None, *, official_keys: bool = False
    ) -> Tensor:
        """Read the features.

        Args:
            features: ``[B, N, Dv]`` in raster order.
            grid: rows and columns, N in all.
            count: how many queries read, the first ones; None = all.
            official_keys: keys are positions alone.

        Returns:
            ``[B, count, D]``; of two counts, the smaller gives the first rows of the larger.
        """
        places = resized_table(self.pos_embed, *grid)
        keys = self.ln_k(places).expand_as(features) if official_keys else self.ln_k(features) + places
        query = self.ln_q(self.query[:count] + self.pos_embed[:count])
        asked = query.expand(features.shape[0], -1, -1)
        found: Tensor = self.attn(asked, keys, self.ln_v(features), need_weights=False)[0] @ self.proj
        return found
