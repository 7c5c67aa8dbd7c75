"""Matryoshka multimodal models: nested grids of one image, of which any serves at run time."""

from __future__ import annotations

from dataclasses import dataclass

from mmfast.registry import register
from mmfast.token_pruning.projector_base import BlockMerger
from mmfast.tokens import Keep, VisualTokens


@register("m3_pool", stage="before_llm", paper="arXiv 2405.17430", source="mu-cai/matryoshka-mm", training_free=False)
@dataclass(frozen=True)
class M3Pool(BlockMerger):
    """Average square blocks of embeddings, for a model that was trained at every scale.

    Nothing is learned here: the model is, by the mean of the losses over all scales (``recipes/matryoshka.toml``), and
    then serves at any of them. On a grid of 24 x 24 the scales are 576, 144, 64, 36, 16, 9, 4 and 1.

    Paper: "Matryoshka Multimodal Models", ICLR 2025.
    """

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Pool the grid."""
        blocks = self.blocked(tokens, kept)
        return blocks.keep(blocks.mean(tokens.features.float()).to(tokens.features.dtype))
