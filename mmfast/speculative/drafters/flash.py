"""FLASH: images compressed to a few latent tokens, several tokens foretold at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmfast.registry import register
from mmfast.speculative.base import Draft, Request, RowSession
from mmfast.speculative.heads.base import HeadConfig, Shapes
from mmfast.speculative.heads.static import LatentHead
from mmfast.speculative.heads.stream import Stream
from mmfast.speculative.heads.tree import ShapeDrafter, filled


@register("flash", stage="decode", paper="arXiv 2505.12728", source="ZihuaEvan/FlashSD", training_free=False)
@dataclass(frozen=True)
class Flash(ShapeDrafter[LatentHead]):
    """Draft k tokens with one pass over a prompt whose images are compressed.

    The equations are the paper's; the published code does not run. Ours are: text before an image is fused like text
    after it, compressed tokens stand spread over the positions of the image, the attention has its input added and a
    norm behind it. The shape of the tree is chosen by an assumed chance of each rank.

    Weights: ``A`` ``[C, D]``, ``fc`` ``[D, 2 D]`` with bias, ``self_attn.{q,k,v,o}_proj``, ``norm.weight``, ``mlp.0``
    ``[I, D]`` and ``mlp.2`` ``[k D, I]`` with bias.

    Paper: "FLASH: Latent-Aware Semi-Autoregressive Speculative Decoding for Multimodal Tasks".

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: levels at most, and no more than k.
        top_k: candidates of a level at most.
    """

    total_tokens: int = 25
    depth: int = 5

    def build(self, config: Mapping[str, Any], shapes: Shapes, width: int, vocabulary: int) -> LatentHead:
        """Make the module of a file."""
        return LatentHead.fitting(HeadConfig.read(config, width), shapes)

    def row(self, head: LatentHead, request: Request, row: int) -> RowSession:
        """Begin one row."""
        return _Row(self, head, request, row)


class _Row(Stream):
    head: LatentHead

    def __init__(self, drafter: Flash, head: LatentHead, request: Request, row: int) -> None:
        super().__init__(head, request, row)
        self._drafter, self._stop = drafter, request.stop

    @torch.no_grad()
    def propose(self, root: int, budget: int) -> Draft:
        """Fill the tree from one pass."""
        outputs = self.advance(root)
        if root in self._stop:
            return Draft()
        levels = self.words.logs(self.head.foretell(outputs)[0])
        return filled(self._drafter.shape(budget, len(levels)), levels, self._stop)
