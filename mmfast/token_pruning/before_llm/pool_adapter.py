"""InfMLLM's pool-adapter: a smaller grid of averages, with a projector that is trained on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmfast.registry import register
from mmfast.token_pruning.projector_base import BlockMerger, Blocks, LearnedMerger, block_size
from mmfast.tokens import Keep, VisualTokens


@register("pool_adapter", stage="before_llm", paper="arXiv 2311.06791", source="mightyzau/InfMLLM", training_free=False)
@dataclass(frozen=True)
class PoolAdapterMerger(BlockMerger, LearnedMerger):
    """Average square blocks of the encoder's features and project them with a trained projector of its own.

    What is left is a grid, so that answers about places stay possible. The official code takes only blocks that
    divide the grid (``border="refuse"``). Without ``weights`` the projector is random (mechanics only).

    Weights: the state dict of :class:`PoolAdapter`.

    Paper: "InfMLLM: A Unified Framework for Visual-Language Tasks" (arXiv 2311.06791).

    Attributes:
        keep: tokens left; int = count per image, float = fraction.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    keep: int | float | None = 64

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Average and project."""
        blocks = self.blocked(tokens, kept)
        read = tokens.signals.get("patch_features", tokens.features)
        module = self.part(tokens, PoolAdapter, read.shape[-1], tokens.features.shape[-1])
        return blocks.keep(module.project(blocks.mean(read.float())).to(tokens.features.dtype))


class PoolAdapter(nn.Module):
    """Block averages, then two linear layers.

    Args:
        width: of the features, Dv.
        out: width of the embeddings, D.

    Example:
        >>> import torch
        >>> PoolAdapter(8, 12)(torch.randn(1, 16, 8), (4, 4), 4).shape
        torch.Size([1, 4, 12])
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, features: Tensor, grid: tuple[int, int], count: int) -> Tensor:
        """Pool to at most ``count`` tokens.

        Args:
            features: ``[B, N, Dv]`` in raster order, without a class token.
            grid: rows and columns, N in all.
            count: how many tokens are wanted; blocks have to divide the grid.

        Returns:
            ``[B, k, D]`` with k at most ``count``.

        Raises:
            ValueError: if no block divides the grid into so few.
        """
        blocks = Blocks(*grid, block_size(*grid, count, "refuse"))
        return self.project(blocks.mean(features))

    def project(self, pooled: Tensor) -> Tensor:
        """Turn averages ``[..., Dv]`` into embeddings ``[..., D]``."""
        found: Tensor = self.mlp(pooled)
        return found
