"""FlowCut, inside the language model: what the last token looks at, in keys and in values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerRequest, LayerScorer, LayerTokens


@register("flowcut_llm", stage="in_llm", paper="arXiv 2505.19536", source="TungChintao/FlowCut", vectors=True)
@dataclass(frozen=True)
class FlowCutLLM(DropOnce, LayerScorer):
    """Drop once, early, by how the last prompt token relates to each visual token in keys and in values.

    Two softmaxes over the visual tokens, of query times key and of value times value, are averaged over the
    heads, normalised and added, and weighed by the size of the token's own value. The layer's own attention is
    read ahead, so that it already works on what is left. The official code scores every second prompt of a batch
    on swapped axes; here each prompt is scored alike.

    Paper: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    NeurIPS 2025.
    """

    needs = frozenset({"attention"})

    layer: int | float = 1

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for queries, keys and values of the layer that is about to run."""
        return LayerRequest(event.layer, ahead=True, queries="last", values=True)

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Combine relation and semantics of the last prompt token."""
        relation, semantic, weight = relations(tokens.view(), tokens.last_token, tokens.candidates)
        return combined(relation, semantic, weight)


def relations(view: AttentionView, row: int, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relate one token to others by query and key, and by value and value.

    Args:
        view: attention with values.
        row: the token.
        columns: ``[V]`` int64, the others.

    Returns:
        float32 ``[V]`` each: the head-averaged softmax over the columns of query times key, the same of value
        times value, and the L1 norm of the head-averaged value of each column.

    Raises:
        ValueError: if values were not asked for.

    Example:
        >>> view = AttentionView(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 4))
        >>> [part.tolist() for part in relations(view, 2, torch.arange(2))]
        [[0.5, 0.5], [0.5, 0.5], [4.0, 4.0]]
    """
    if view.value is None:
        raise ValueError("values are missing; ask for them with LayerRequest(values=True)")
    logits = view.logits(torch.tensor([row], device=columns.device), masked=False)[:, 0, view.past :]
    relation = logits[:, columns].softmax(dim=-1).mean(dim=0)
    values = view.value[:, view.past :].float()
    own = values[:, columns]
    alike = torch.einsum("gd,gvd->gv", values[:, row], own) * values.shape[-1] ** -0.5
    # Grouped heads share their values: each counts as often as it is used, which an average does not notice.
    return relation, alike.softmax(dim=-1).mean(dim=0), own.mean(dim=0).abs().sum(dim=-1)


def combined(relation: Tensor, semantic: Tensor, weight: Tensor) -> Tensor:
    """Normalise both relations, add them and weigh the sum, all ``[V]``.

    Example:
        >>> combined(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])).tolist()
        [1.5, 1.25]
    """
    total = relation / relation.sum().clamp_min(1e-12) + semantic / semantic.sum().clamp_min(1e-12)
    return total * weight
