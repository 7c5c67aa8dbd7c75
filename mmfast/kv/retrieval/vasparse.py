"""VASparse: what the query agrees with, and what has looked at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import PromptReader
from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView


@register("vasparse", stage="cache", paper="arXiv 2501.06553", source="mengchuang123/VASparse-github")
@dataclass(frozen=True)
class VASparse(PromptReader):
    """Read the entries that agree with the query or whose tokens looked at the visual ones.

    Experimental: it follows the text of the paper, whose released code does not run as described, and covers the
    choice of entries, not the contrast of logits. An entry scores the square of its key's product with the query,
    as it is before scaling and on average over the heads, and its share of visual attention: the softmax, over the
    entries, of what each token gives to visual tokens. All heads read the same entries.

    Paper: "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification",
    CVPR 2025.

    Attributes:
        keep: entries of the prompt to read.
        visual_weight: weight of the share of visual attention.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    visual_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.visual_weight, bool) or not self.visual_weight >= 0:
            raise ValueError(f"visual_weight={self.visual_weight!r} must be a number of at least 0")

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the shares of visual attention, ``[n]``."""
        entries.memory["saliency"] = visual_saliency(entries.view, entries.visual)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return the highest scores, ``[total]``."""
        saliency = step.memory["saliency"]
        if saliency.shape[-1] != total:
            return None
        view = AttentionView(step.query, step.keys[:, :total], scaling=1.0)
        products = view.logits(torch.zeros(1, dtype=torch.int64, device=step.keys.device), masked=False)[:, 0]
        scores = products.square().mean(dim=0) + self.visual_weight * saliency
        if step.real is not None:
            scores = scores.masked_fill(~step.real[:, :total].any(dim=0), -torch.inf)
        return top_mask(torch.nan_to_num(scores, nan=-torch.inf), kept)


def visual_saliency(view: AttentionView, visual: Tensor) -> Tensor:
    """Compare, by a softmax over the tokens, what each of them gives to visual tokens on average over the heads.

    Args:
        view: attention of the prompt.
        visual: ``[n]`` bool.

    Returns:
        float32 ``[n]``, adding up to one.

    Example:
        >>> view = AttentionView(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
        >>> share = visual_saliency(view, torch.tensor([True, False]))
        >>> bool(share[0] > share[1]), round(share.sum().item(), 4)
        (True, 1.0)
    """
    return torch.nan_to_num(view.mass(visual).mean(dim=0)).softmax(dim=0)
