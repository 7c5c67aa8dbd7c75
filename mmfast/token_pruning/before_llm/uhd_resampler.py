"""LLaVA-UHD: each slice of a large picture is read by a few queries that know the shape of the slice."""

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
    square_side,
    square_table,
)
from mmfast.tokens import Keep, VisualTokens


@register("uhd_resampler", stage="before_llm", paper="arXiv 2403.11703", source="thunlp/LLaVA-UHD", training_free=False)
@dataclass(frozen=True)
class UhdResamplerMerger(LearnedMerger):
    """Let a square of learned queries read each tile, in the place of the projector.

    The positions added to the keys are those of the tile's actual grid, so that tiles of any shape can be read.
    Without ``weights`` the queries are random (mechanics only).

    Weights: the state dict of :class:`UhdResampler`; they fit one number of queries.

    Paper: "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images", ECCV 2024.

    Attributes:
        keep: how many queries per image, shared out among its tiles; of each share the largest square that is not
            more. The paper has 64 per tile. Float = fraction of the tokens.
        heads: attention heads.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    fits_grid = True

    keep: int | float | None = 64
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(heads=self.heads)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Ask the queries."""
        read = tokens.signals.get("patch_features", tokens.features)
        sizes = (read.shape[-1], tokens.features.shape[-1], square_side(kept), self.heads)
        found = self.part(tokens, UhdResampler, *sizes)(read.float()[None], grid_or_row(tokens))[0]
        return query_keep(len(tokens), found.to(tokens.features.dtype))


class UhdResampler(nn.Module):
    """One cross-attention between norms, and a linear layer.

    Args:
        width: of the features, Dv.
        out: width of the embeddings, D; a multiple of 4 and of ``heads``.
        side: side x side queries.
        heads: attention heads.

    Example:
        >>> module = UhdResampler(6, 8, side=2, heads=2)
        >>> module(torch.randn(1, 12, 6), (3, 4)).shape
        torch.Size([1, 4, 8])
    """

    pos_embed: Tensor

    def __init__(self, width: int, out: int, side: int = 8, heads: int = 8) -> None:
        super().__init__()
        check_heads(heads, out)
        self.register_buffer("pos_embed", square_table(side, out))
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(side * side, out), std=0.02))
        self.kv_proj = nn.Linear(width, out, bias=False)
        self.attn = nn.MultiheadAttention(out, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(out, eps=1e-6)
        self.ln_kv = nn.LayerNorm(out, eps=1e-6)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        small_start(self)
        self.proj = nn.Parameter(out**-0.5 * torch.randn(out, out))

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read the features of tiles of one shape.

        Args:
            features: ``[B, N, Dv]`` in raster order, without a class token.
            grid: rows and columns, N in all.

        Returns:
            ``[B, side * side, D]``.
        """
        value = self.ln_kv(self.kv_proj(features))
        key = value + resized_table(self.pos_embed, *grid)
        query = (self.ln_q(self.query) + self.pos_embed).expand(features.shape[0], -1, -1)
        found: Tensor = self.ln_post(self.attn(query, key, value, need_weights=False)[0]) @ self.proj
        return found


def slice_grid(width: int, height: int, side: int = 336, most: int = 6) -> tuple[int, int]:
    """Return into how many columns and rows of slices LLaVA-UHD cuts a picture.

    As many as it has times the encoder's area, or one more or less, in the grid whose shape is nearest to the
    picture's; (1, 1) where it is no larger than the encoder's input.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        side: of the encoder's input in pixels.
        most: most slices.

    Example:
        >>> slice_grid(672, 1088), slice_grid(336, 336), slice_grid(2000, 300)
        ((2, 3), (1, 1), (6, 1))
    """
    wanted = min(math.ceil(width * height / side**2), most)
    if wanted <= 1:
        return (1, 1)
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= most]
    grids = [(cols, count // cols) for count in counts for cols in range(1, count + 1) if not count % cols]
    # Rounded, so that of two grids equally far off, such as 2 x 3 and 3 x 2, the narrower is taken on every machine.
    return min(grids, key=lambda grid: round(abs(math.log(width / height) - math.log(grid[0] / grid[1])), 9))
