"""MMTok: cover the words of the question and the image itself with as few tokens as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.greedy_cover import greedy_cover
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
        words, temperatures = tokens.signals["text_embeds"], (self.text_temperature, self.visual_temperature)
        return best_cover(coverage(tokens.features, patches, words, self.alpha, temperatures), kept)


def coverage(
    features: Tensor, patches: Tensor, words: Tensor, alpha: float, temperatures: tuple[float, float]
) -> Tensor:
    """Say how well each visual token covers each word and each patch.

    Args:
        features: ``[N, D]`` visual tokens as words see them.
        patches: ``[N, C]`` the same as they see each other.
        words: ``[M, D]``.
        alpha: weight of patches, against 1 for words.
        temperatures: of the softmax for words and for patches.

    Returns:
        float32 ``[N, M + N]``; the columns of words add up to 1 together, those of patches to ``alpha``.

    Example:
        >>> coverage(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3), 0.5, (1.0, 1.0)).tolist()
        [[0.5, 0.125, 0.125], [0.5, 0.125, 0.125]]
    """
    total, count = features.shape[0], words.shape[0]
    # Filled in place and block by block: for large images this one matrix is all that fits.
    found = torch.empty(total, count + total, device=features.device)
    for start, rows, columns, weight, temperature in (
        (0, normalised(words), normalised(features), 1.0 / max(count, 1), temperatures[0]),
        (count, normalised(patches), normalised(patches), alpha / total, temperatures[1]),
    ):
        for part in row_blocks(rows.shape[0], total):
            alike = (rows[part] @ columns.T / temperature).softmax(dim=-1)
            found[:, start + part.start : start + part.stop] = (alike * weight).T
    return found


def best_cover(weights: Tensor, kept: int, excluded: Tensor | None = None) -> Tensor:
    """Pick tokens one by one, each adding most to the sum of the best weights so far.

    Args:
        weights: float32 ``[N, R]``, 0 or more: how well each token covers each thing.
        kept: how many tokens; all where there are fewer.
        excluded: int64, tokens that may not be picked.

    Returns:
        int64 ``[kept]`` in the order of the picks; ties go to the lower index.

    Example:
        >>> best_cover(torch.tensor([[0.5, 0.0], [0.4, 0.4], [0.0, 0.3]]), 2).tolist()
        [1, 0]
    """
    total = weights.shape[0]
    barred = torch.zeros(total, dtype=torch.bool, device=weights.device)
    if excluded is not None:
        barred[excluded] = True
    free = total if excluded is None else total - int(barred.sum())
    return greedy_cover(weights[None], min(kept, free), excluded=barred[None])[0]
