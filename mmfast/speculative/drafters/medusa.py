"""Medusa: heads on the last hidden state, each one token further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmfast.registry import register
from mmfast.speculative.base import Draft, Request, RowSession, Verified
from mmfast.speculative.heads.base import Shapes
from mmfast.speculative.heads.static import MedusaHeads
from mmfast.speculative.heads.stream import Words, states
from mmfast.speculative.heads.tree import ShapeDrafter, filled


@register("medusa", stage="decode", paper="arXiv 2401.10774", source="FasterDecoding/Medusa", training_free=False)
@dataclass(frozen=True)
class Medusa(ShapeDrafter[MedusaHeads]):
    """Draft with independent heads that read the last hidden state alone.

    Head ``i`` foretells the token ``i + 2`` places after the hidden state it reads; every level of the tree takes the
    likeliest tokens of its head, whatever leads there. The shape of the tree is chosen by an assumed chance of each
    rank, not searched on data as the official one.

    Weights: ``{i}.{b}.linear.weight`` ``[D, D]`` and ``.bias`` of residual block ``b`` of head ``i``, then its output
    layer ``{i}.{blocks}.weight`` ``[V, D]``. Files without output layers share the model's.

    Paper: "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads".

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: levels at most, and no more than there are heads.
        top_k: candidates of a head at most.
    """

    def build(self, config: Mapping[str, Any], shapes: Shapes, width: int, vocabulary: int) -> MedusaHeads:
        """Make the module of a file."""
        return MedusaHeads.fitting(shapes, width, vocabulary)

    def row(self, head: MedusaHeads, request: Request, row: int) -> RowSession:
        """Begin one row."""
        return _Row(self, head, request, row)


class _Row(RowSession):
    def __init__(self, drafter: Medusa, heads: MedusaHeads, request: Request, row: int) -> None:
        self._drafter, self._heads, self._stop = drafter, heads, request.stop
        self._words = Words(request)
        self._feature = request.prefill[row].hidden[-1]

    @torch.no_grad()
    def propose(self, root: int, budget: int) -> Draft:
        """Fill the tree; the root was foretold by the model itself and is not read."""
        if root in self._stop:
            return Draft()
        features = self._heads.features(self._feature)
        outputs = self._heads.outputs()
        levels = torch.stack([self._words.logs(x, out) for x, out in zip(features, outputs, strict=True)])
        return filled(self._drafter.shape(budget, len(levels)), levels, self._stop)

    def observe(self, verified: Verified) -> None:
        """Take the hidden state of the last token that was accepted."""
        self._words.note(verified)
        self._feature = states(verified)[verified.path[-1]]
