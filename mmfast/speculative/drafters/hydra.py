"""Hydra: heads that read the tokens drafted before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmfast.registry import register
from mmfast.speculative.base import Draft, Request, RowSession
from mmfast.speculative.heads.base import Shapes
from mmfast.speculative.heads.static import HydraHeads
from mmfast.speculative.heads.stream import Stream
from mmfast.speculative.heads.tree import Filling, ShapeDrafter, likeliest


@register("hydra", stage="decode", paper="arXiv 2402.05109", source="zankner/Hydra", training_free=False)
@dataclass(frozen=True)
class Hydra(ShapeDrafter[HydraHeads]):
    """Draft level by level with heads that read the path to each node.

    Head ``i`` reads the hidden state and the embeddings of the root and of the ``i`` tokens drafted after it. Where the
    file holds the layer of Hydra++, it runs over the hidden states first. Images take part through the hidden states
    at their places.

    Weights: ``hydra_mlp.{i}.1.linear`` and ``.res_connection`` ``[D, (i + 2) D]`` of head ``i``, its further residual
    blocks ``hydra_mlp.{i}.{3, 5, ...}.linear`` ``[D, D]``, its output layer ``hydra_lm_head.{i}.1`` ``[V, D]``, all
    with bias; files without output layers share the model's. Hydra++ adds ``prefix_embeding_layer.layers.0.*``, a
    Llama layer, and ``prefix_embeding_layer.norm.weight``.

    Paper: "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding".

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: levels at most, and no more than there are heads.
        top_k: candidates of a node at most.
    """

    def build(self, config: Mapping[str, Any], shapes: Shapes, width: int, vocabulary: int) -> HydraHeads:
        """Make the module of a file."""
        return HydraHeads.fitting(config, shapes, width, vocabulary)

    def row(self, head: HydraHeads, request: Request, row: int) -> RowSession:
        """Begin one row."""
        return _Row(self, head, request, row)


class _Row(Stream):
    head: HydraHeads

    def __init__(self, drafter: Hydra, heads: HydraHeads, request: Request, row: int) -> None:
        super().__init__(heads, request, row)
        self._drafter, self._stop = drafter, request.stop

    @torch.no_grad()
    def propose(self, root: int, budget: int) -> Draft:
        """Fill the tree, one head for all nodes of a level."""
        feature = self.advance(root)
        if root in self._stop:
            return Draft()
        levels = len(self.head.hydra_mlp)
        filling = Filling(self._drafter.shape(budget, levels), self._stop)
        for level in range(levels):
            nodes = filling.open()
            if not nodes:
                break
            embeds = self.words.embed([[root, *filling.path(node)] for node in nodes]).flatten(1)
            joined = torch.cat([feature.expand(len(nodes), -1), embeds], dim=-1)
            logs = self.words.logs(self.head.features(level, joined), self.head.output(level))
            filling.fill(dict(zip(nodes, likeliest(logs, filling.width()), strict=True)))
        return filling.draft()
