"""TokenPacker: coarse queries take up the details of their own blocks, from several layers of the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.registry import register
from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.projector_base import (
    BlockMerger,
    Blocks,
    LearnedMerger,
    check_heads,
    check_positive,
    small_start,
)
from mmfast.tokens import Keep, VisualTokens


@register(
    "tokenpacker", stage="before_llm", paper="arXiv 2407.02392", source="CircleRadon/TokenPacker", training_free=False
)
@dataclass(frozen=True)
class TokenPackerMerger(BlockMerger, LearnedMerger):
    """Shrink the grid of features and let each point look into its own block, in the place of the projector.

    What it looks at are the outputs of several blocks of the encoder. Without ``weights`` the module is random
    (mechanics only).

    Weights: the state dict of :class:`TokenPacker`, whose names are those of the official code.

    Paper: "TokenPacker: Efficient Visual Projector for Multimodal LLM", IJCV 2025.

    Attributes:
        keep: tokens left; int = count per image, float = fraction.
        layers: blocks of the vision encoder whose outputs are looked at, as relative depths or indices from 0. The
            default are the official blocks 11, 15, 21 and 22 of 24.
        heads: attention heads.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    keep: int | float | None = 0.25
    layers: tuple[int | float, ...] = (0.46, 0.63, 0.88, 0.92)
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _depths(self.layers))
        check_positive(heads=self.heads)

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the features, and for the outputs of the layers."""
        levels = {f"level_{number}": VisionSignal("patch_features", layer) for number, layer in enumerate(self.layers)}
        return {**super().vision_signals(), **levels}

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Pack the blocks."""
        blocks = self.blocked(tokens, kept)
        read = tokens.signals.get("patch_features", tokens.features)
        levels = [tokens.signals.get(f"level_{number}", read) for number in range(len(self.layers))]
        joined = torch.cat([level.float() for level in levels], dim=-1)
        sizes = (read.shape[-1], joined.shape[-1], tokens.features.shape[-1], self.heads)
        module = self.part(tokens, TokenPacker, *sizes)
        return blocks.keep(module.pack(read.float()[None], joined[None], blocks)[0].to(tokens.features.dtype))


def _depths(layers: object) -> tuple[int | float, ...]:
    """Check that layers are named; plan files hold lists where a hashable object needs tuples.

    Raises:
        ValueError: if they are not.
    """
    found = tuple(layers) if isinstance(layers, tuple | list) else ()
    if not found or any(isinstance(layer, bool) or not isinstance(layer, int | float) for layer in found):
        raise ValueError(f"layers={layers!r} must name at least one block, such as (0.5, 0.9)")
    return found


class TokenPacker(nn.Module):
    """Point-to-region attention, then two linear layers.

    Args:
        width: of the features, Dv; a multiple of ``heads``.
        levels: width of the joined outputs of all layers.
        out: width of the embeddings, D.
        heads: attention heads.

    Example:
        >>> module = TokenPacker(8, 16, 12, heads=2)
        >>> module(torch.randn(1, 36, 8), torch.randn(1, 36, 16), (6, 6), 3).shape
        torch.Size([1, 4, 12])
    """

    def __init__(self, width: int, levels: int, out: int, heads: int = 8) -> None:
        super().__init__()
        check_heads(heads, width)
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(levels, width), nn.GELU(), nn.Linear(width, width))
        self.v_proj_1 = nn.Sequential(nn.Linear(levels, width), nn.GELU(), nn.Linear(width, width))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        small_start(self)

    def forward(self, features: Tensor, levels: Tensor, grid: tuple[int, int], side: int = 2) -> Tensor:
        """Pack blocks of ``side`` x ``side`` tokens into one each.

        Args:
            features: ``[B, N, Dv]`` in raster order, without a class token.
            levels: ``[B, N, width of all layers]``.
            grid: rows and columns, N in all.
            side: of a block.

        Returns:
            ``[B, N / side ** 2, D]``.

        Raises:
            ValueError: if the blocks do not divide the grid.
        """
        if side < 1 or grid[0] % side or grid[1] % side:
            raise ValueError(f"side={side} must be the side of a block that divides the grid of {grid}")
        return self.pack(features, levels, Blocks(*grid, side))

    def pack(self, features: Tensor, levels: Tensor, blocks: Blocks) -> Tensor:
        """Pack blocks of which those at the border may be smaller."""
        down, right = blocks.shape
        whole = rearrange(features, "b (h w) d -> b d h w", h=blocks.rows)
        if blocks.drop:
            whole = whole[..., : down * blocks.side, : right * blocks.side]
        # As in the official code between pixel centres and without smoothing, so that a block sees itself alone.
        points = rearrange(functional.interpolate(whole, size=(down, right), mode="bilinear"), "b d h w -> (b h w) 1 d")
        cells, real = blocks.cut(levels)
        query = self.ln_q_1(self.q_proj_1(points))
        region = rearrange(cells, "b k p d -> (b k) p d")
        key, value = self.ln_k_1(self.k_proj_1(region)), self.ln_v_1(self.v_proj_1(region))
        hidden = (~real).repeat(features.shape[0], 1)
        found = self.clip_attn(query, key, value, key_padding_mask=hidden, need_weights=False)[0]
        packed: Tensor = self.mlp(rearrange(found, "(b k) 1 d -> b k d", b=features.shape[0]))
        return packed
