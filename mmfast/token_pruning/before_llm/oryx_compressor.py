"""Oryx: each block of features is averaged, and the average looks once at what it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfast.registry import register
from mmfast.token_pruning.projector_base import BlockMerger, Blocks, LearnedMerger
from mmfast.tokens import Keep, VisualTokens

RATES = {"image": 1, "text": 1, "video": 2, "video_long": 4}
"""Side of the blocks by what is shown: 1, 4 or 16 tokens become one."""

INNER = 256
"""Width in which an average is compared with its tokens."""


@register(
    "oryx_compressor",
    stage="before_llm",
    paper="arXiv 2409.12961",
    source="Oryx-mllm/Oryx",
    vectors=True,
    training_free=False,
)
@dataclass(frozen=True)
class OryxCompressorMerger(BlockMerger, LearnedMerger):
    """Average square blocks of the encoder's features and add what the average attends to in its block.

    The sum has about twice the scale of the features, at every rate: the projector must be trained with it. (The
    official module also doubles images it does not shrink. Here ``keep=1.0`` changes nothing; take
    :class:`OryxCompressor` itself where a model was trained with that.) Trained are blocks of 1, 2 and 4 tokens a side.
    Without ``weights`` the attention is random (mechanics only).

    Weights: the state dict of :class:`OryxCompressor`, whose names are those of the official code.

    Paper: "Oryx MLLM: On-Demand Spatial-Temporal Understanding at Arbitrary Resolution", ICLR 2025.

    Attributes:
        keep: tokens left; int = count per image, float = fraction.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    keep: int | float | None = 0.25

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Compress the grid."""
        blocks = self.blocked(tokens, kept)
        read, space = self.material(tokens)
        module = self.part(tokens, OryxCompressor, read.shape[-1])
        return blocks.keep(module.compress(read.float(), blocks).to(read.dtype), space)


class OryxCompressor(nn.Module):
    """Averages that attend to their blocks.

    Args:
        width: of the features, Dv.

    Example:
        >>> module = OryxCompressor(8)
        >>> compressed, grid = module(torch.randn(3, 24, 8), (4, 6), "video")
        >>> compressed.shape, grid
        (torch.Size([3, 6, 8]), (2, 3))
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vlm_query_projector = nn.Linear(width, INNER)
        self.vlm_key_projector = nn.Linear(width, INNER)

    def forward(
        self, features: Tensor, grid: tuple[int, int], mode: str | int = "image"
    ) -> tuple[Tensor, tuple[int, int]]:
        """Compress images or frames.

        Args:
            features: ``[T, h * w, Dv]`` in raster order.
            grid: h and w.
            mode: a name of :data:`RATES`, or the side of the blocks.

        Returns:
            ``[T, h * w / side ** 2, Dv]`` and the new grid.

        Raises:
            ValueError: for another mode, or if the blocks do not divide the grid.
        """
        side = RATES.get(mode) if isinstance(mode, str) else mode
        if side is None or side < 1:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(RATES)}, or the side of a block, at least 1")
        if grid[0] % side or grid[1] % side:
            raise ValueError(f"mode={mode!r} takes blocks of {side} x {side}, which do not divide a grid of {grid}")
        blocks = Blocks(*grid, side)
        return self.compress(features, blocks), blocks.shape

    def compress(self, features: Tensor, blocks: Blocks) -> Tensor:
        """Compress ``[..., N, Dv]`` to ``[..., blocks, Dv]``; blocks at the border may be smaller."""
        cells, real = blocks.cut(features)
        pooled = cells.sum(dim=-2) / real.sum(dim=-1, keepdim=True)
        query = self.vlm_query_projector(pooled)[..., None, :]
        scores = (query @ self.vlm_key_projector(cells).transpose(-1, -2)) / INNER**0.5
        # Overflow in half precision gives no number; the official code counts it as 0.
        scores = scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).masked_fill(~real[:, None], -torch.inf)
        found: Tensor = pooled + (scores.softmax(dim=-1) @ cells)[..., 0, :]
        return found
