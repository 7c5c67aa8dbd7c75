"""MMTok: cover the words of the question and the image itself with as few tokens as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.similarity import normalised, row_blocks
from mmfast.tokens import VisualTokens


@register("mmtok", stage="before_llm", paper="arXiv 2508.18264", source="Ironieser/MMTok", vectors=True)
@dataclass(frozen=True)
class MMTok(Selector):
    """Choose tokens one by one so that words and patches are covered best.

    A word is covered by the visual tokens it resembles, a patch by those that resemble it; either likeness is a
    softmax over the visual tokens. Each pick is the token that adds most coverage. Words are all rows of the
    prompt's text, because stop words can only be told with the tokenizer.

    Paper: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026.

    Attributes:
        alpha: weight of covering patches, against 1 for covering words; 0 or more.
        text_temperature: temperature of the softmax over words' likeness.
        visual_temperature: the same for patches.
    """

    needs = frozenset({"text_embeds", "patch_features"})
    reads_question = True

    scope: Literal["global", "per_tile"] = "per_tile"
    alpha: float = 0.5
    text_temperature: float = 0.02
    visual_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0.0:
            raise ValueError(f"alpha={self.alpha} must be 0 or more")
        for name in ("text_temperature", "visual_temperature"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for what the encoder made of each patch."""
        return {"patch_features": VisionSignal("patch_features")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Pick tokens by the coverage they add."""
        patches = tokens.signals.get("patch_features", tokens.features)
        words = likeness(tokens.signals["text_embeds"], tokens.features, self.text_temperature)
        image = likeness(patches, patches, self.visual_temperature)
        return best_cover(torch.cat([words, self.alpha * image]), kept)


def likeness(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Return the softmax over columns of cosine similarities, divided by the number of rows.

    Args:
        rows: ``[R, D]``.
        columns: ``[N, D]``.
        temperature: divides the similarities.

    Returns:
        float32 ``[R, N]``, all entries adding up to one.

    Example:
        >>> likeness(torch.eye(2), torch.ones(2, 2), 1.0).tolist()
        [[0.25, 0.25], [0.25, 0.25]]
    """
    return (normalised(rows) @ normalised(columns).T / temperature).softmax(dim=-1) / max(rows.shape[0], 1)


def best_cover(weights: Tensor, kept: int, excluded: Tensor | None = None) -> Tensor:
    """Pick columns one by one, each adding most to the sum over rows of the best weight so far.

    Args:
        weights: ``[R, N]`` float32, 0 or more.
        kept: how many columns.
        excluded: int64 columns that may not be picked.

    Returns:
        ``[kept]`` int64 in the order of the picks; ties go to the lower index.

    Example:
        >>> best_cover(torch.tensor([[0.5, 0.4, 0.0], [0.0, 0.4, 0.3]]), 2).tolist()
        [1, 0]
    """
    covered = weights.new_zeros(weights.shape[0])
    free = torch.ones(weights.shape[1], dtype=torch.bool, device=weights.device)
    if excluded is not None:
        free[excluded] = False
    picks = torch.empty(kept, dtype=torch.int64, device=weights.device)
    for step in range(kept):
        gain = weights.new_zeros(weights.shape[1])
        for part in row_blocks(weights.shape[0], weights.shape[1]):
            gain += (weights[part] - covered[part, None]).clamp_min(0.0).sum(dim=0)
        pick = gain.masked_fill(~free, -torch.inf).argmax()
        picks[step] = pick
        free[pick] = False
        covered = torch.maximum(covered, weights[:, pick])
    return picks
