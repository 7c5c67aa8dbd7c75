"""TRIM: keep what matches the question in CLIP's space, and the mean of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Merger, VisionSignal, check_choice, top_indices
from mmfast.token_pruning.before_llm.cdpruner import clip_embeddings, llm_relevance
from mmfast.token_pruning.similarity import merged_keep, outlier_share
from mmfast.tokens import Keep, VisualTokens


@register("trim", stage="before_llm", source="FreedomIntelligence/TRIM", paper="arXiv 2409.10994", vectors=True)
@dataclass(frozen=True)
class Trim(Merger):
    """Keep the tokens most relevant to the question, and one that is the mean of all others.

    In CLIP's space relevance is the negative product of patch and question, as in the official code (patches
    there point away from what they show). Without a CLIP model, ``relevance="llm"`` compares features with the
    mean embedding of the prompt's text by cosine. The mean of what is dropped takes one of the ``keep`` places,
    that of the last dropped token; where there is only one place, it is all that is left.

    ``keep=None`` keeps as many tokens as have outstanding scores (above the upper quartile by 1.5
    interquartile ranges), plus the mean.

    Paper: "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
    COLING 2025.

    Attributes:
        relevance: ``"llm"``, or ``"clip"`` with a CLIP model passed to :func:`mmfast.accelerate`.
    """

    needs = frozenset({"text_embeds", "patch_features"})
    reads_question = True
    adaptive = True

    keep: int | float | None = None
    relevance: Literal["llm", "clip"] = "llm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ["llm", "clip"])

    @property
    def wants_clip(self) -> bool:
        """Whether signals of a CLIP model are needed."""
        return self.relevance == "clip"

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for what the projector reads, to take means before it."""
        return {"patch_features": VisionSignal("patch_features")}

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Score every token, float32 ``[N]``."""
        if self.relevance == "clip":
            patches, text = clip_embeddings(tokens)
            return relevance_of(patches, text.float().mean(dim=0))
        return llm_relevance(tokens.features, tokens.signals["text_embeds"])

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the outstanding scores, and one for the mean."""
        scores = self.scores(tokens)
        return int(len(tokens) * outlier_share(scores)) + 1

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Keep the best and average the rest."""
        features, space = self.material(tokens)
        return with_mean_of_rest(features, top_indices(self.scores(tokens), kept - 1), space)


def relevance_of(patches: Tensor, text: Tensor) -> Tensor:
    """Turn negative products of patches and question into shares.

    Args:
        patches: ``[N, E]`` patch embeddings, not normalised.
        text: ``[E]`` embedding of the question.

    Returns:
        float32 ``[N]``, adding up to one.

    Example:
        >>> relevance_of(torch.zeros(2, 3), torch.ones(3)).tolist()
        [0.5, 0.5]
    """
    return (-(patches.float() @ text.float())).softmax(dim=0)


def with_mean_of_rest(features: Tensor, best: Tensor, space: Literal["llm", "vision"] = "llm") -> Keep:
    """Keep some tokens and put the mean of all others into the place of the last of these.

    Args:
        features: ``[N, C]``.
        best: ``[n]`` int64, ascending, fewer than N; may be none.
        space: as of Keep.

    Example:
        >>> kept = with_mean_of_rest(torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([0]))
        >>> kept.indices.tolist(), kept.features.tolist()
        ([0, 2], [[1.0], [4.0]])
    """
    total, count = features.shape[0], best.numel()
    rest = torch.ones(total, dtype=torch.bool, device=features.device)
    rest[best] = False
    mean = features[rest].float().mean(dim=0, keepdim=True).to(features.dtype)
    slots = torch.cat([best, rest.nonzero().squeeze(-1)[-1:]])
    source = torch.full((total,), count, dtype=torch.int64, device=features.device)
    source[best] = torch.arange(count, device=features.device)
    sizes = torch.ones(count + 1, device=features.device)
    sizes[-1] = float(rest.sum())
    return merged_keep(slots, torch.cat([features[best], mean]), sizes, source, space)
