"""LLaVA-Mini's compressor: a few learned queries with places in a grid read all patches of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

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
    square_side,
    square_table,
)
from mmfast.tokens import Keep, VisualTokens


@register(
    "llava_mini_resampler",
    stage="before_llm",
    paper="arXiv 2501.03895",
    source="ictnlp/LLaVA-Mini",
    vectors=True,
    training_free=False,
)
@dataclass(frozen=True)
class LlavaMiniResamplerMerger(LearnedMerger):
    """Let a square of learned queries read the encoder's features; the projector then sees what they read.

    This is the compressor alone: the paper also fuses the image into the text before the language model, see
    :mod:`mmfast.training.modules.llava_mini`. Without ``weights`` the queries are random (mechanics only).

    Weights: the state dict of :class:`LlavaMiniResampler`, whose names are those of the official code; they fit one
    number of queries.

    Paper: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token", ICLR 2025.

    Attributes:
        keep: how many queries; the largest square that is not more. Int = count per image, float = fraction.
        heads: attention heads.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    fits_grid = True

    keep: int | float | None = 1
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(heads=self.heads)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Ask the queries."""
        read, space = self.material(tokens)
        module = self.part(tokens, LlavaMiniResampler, read.shape[-1], square_side(kept), self.heads)
        found = module(read.float()[None], grid_or_row(tokens))[0]
        return query_keep(len(tokens), found.to(read.dtype), space)


class LlavaMiniResampler(nn.Module):
    """One cross-attention, without anything behind it.

    Args:
        width: of the features, Dv; a multiple of 4 and of ``heads``.
        side: side x side queries.
        heads: attention heads.

    Example:
        >>> module = LlavaMiniResampler(8, side=2, heads=2)
        >>> module(torch.randn(1, 12, 8), (3, 4)).shape
        torch.Size([1, 4, 8])
    """

    pos_embed: Tensor

    def __init__(self, width: int, side: int = 1, heads: int = 8) -> None:
        super().__init__()
        check_heads(heads, width)
        self.register_buffer("pos_embed", square_table(side, width))
        self.query = nn.Parameter(nn.init.normal_(torch.empty(side * side, width), std=0.02))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        small_start(self)

    @overload
    def forward(
        self, features: Tensor, grid: tuple[int, int], *, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, features: Tensor, grid: tuple[int, int], *, need_weights: Literal[False] = False) -> Tensor: ...

    def forward(
        self, features: Tensor, grid: tuple[int, int], *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read the features.

        Args:
            features: ``[B, N, Dv]`` in raster order, without a class token.
            grid: rows and columns, N in all.
            need_weights: also say where the queries looked.

        Returns:
            ``[B, side * side, Dv]``, and if wanted the attention ``[B, side * side, N]``, mean of the heads.
        """
        value = self.ln_kv(features)
        key = value + resized_table(self.pos_embed, *grid)
        query = (self.ln_q(self.query) + self.pos_embed).expand(features.shape[0], -1, -1)
        found, weights = self.attn(query, key, value, need_weights=need_weights)
        return (found, weights) if need_weights else found
