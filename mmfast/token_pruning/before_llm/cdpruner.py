"""CDPruner: a subset that is diverse and relevant to the question (a determinantal point process)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.conditional_dpp import conditional_dpp
from mmfast.registry import register
from mmfast.token_pruning.base import Selector, check_choice
from mmfast.token_pruning.similarity import normalised
from mmfast.tokens import VisualTokens


@register("cdpruner", stage="before_llm", paper="arXiv 2506.10967", source="Theia-4869/CDPruner", vectors=True)
@dataclass(frozen=True)
class CDPruner(Selector):
    """Choose the likeliest subset of a point process that rewards relevance and punishes likeness.

    The kernel is the cosine similarity of the features, scaled on both sides by relevance; the subset is found
    greedily. In CLIP's space relevance is the *negative* similarity of patch and question, as in the official
    code. Without a CLIP model, ``relevance="llm"`` takes the similarity, positive, of features and the mean
    embedding of the prompt's text, weighed by ``relevance_weight`` against relevance that is the same for all.

    Relevance is scaled to [0, 1] image by image; the official code does so over the whole batch, which lets
    images change each other's tokens.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    NeurIPS 2025.

    Attributes:
        relevance: ``"llm"``, or ``"clip"`` with a CLIP model passed to :func:`mmfast.accelerate`.
        relevance_weight: for ``"llm"``, how much relevance counts, in [0, 1]; 0 leaves diversity alone.
        theta: sharpens relevance to ``exp(theta / (2 (1 - theta)) * relevance)``; in [0, 1), None = not.
    """

    needs = frozenset({"text_embeds"})
    reads_question = True

    scope: Literal["global", "per_tile"] = "per_tile"
    relevance: Literal["llm", "clip"] = "llm"
    relevance_weight: float = 0.5
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ["llm", "clip"])
        if not 0.0 <= self.relevance_weight <= 1.0:
            raise ValueError(f"relevance_weight={self.relevance_weight} must lie in [0, 1]")
        if self.theta is not None and not 0.0 <= self.theta < 1.0:
            raise ValueError(f"theta={self.theta} must be None or lie in [0, 1)")

    @property
    def wants_clip(self) -> bool:
        """Whether signals of a CLIP model are needed."""
        return self.relevance == "clip"

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Scale relevance, then choose greedily."""
        if self.relevance == "clip":
            scaled = scaled_relevance(clip_relevance(*clip_embeddings(tokens)))
        else:
            raw = llm_relevance(tokens.features, tokens.signals["text_embeds"])
            scaled = 1.0 - self.relevance_weight + self.relevance_weight * scaled_relevance(raw)
        if self.theta is not None:
            scaled = torch.exp(self.theta / (2.0 * (1.0 - self.theta)) * scaled)
        return likeliest_subset(tokens.features, scaled, kept)


def clip_embeddings(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    """Return what a CLIP model made of patches ``[N, E]`` and of the segments of the question ``[M, E]``.

    Raises:
        ValueError: if there is no CLIP model.

    Example:
        >>> signals = {"clip_image_embeds": torch.ones(4, 2), "clip_text_embeds": torch.ones(1, 2)}
        >>> patches, texts = clip_embeddings(VisualTokens.from_features(torch.ones(4, 3), **signals))
        >>> patches.shape, texts.shape
        (torch.Size([4, 2]), torch.Size([1, 2]))
    """
    patches, texts = (tokens.signals.get(name) for name in ("clip_image_embeds", "clip_text_embeds"))
    if patches is None or texts is None:
        raise ValueError(
            "relevance='clip' needs a CLIP model: accelerate(model, plan, clip=mmfast.ClipTower.load(...)), "
            "or take relevance='llm'"
        )
    return patches, texts


def llm_relevance(features: Tensor, text: Tensor) -> Tensor:
    """Return the cosine similarity of features and the mean embedding of a text; 0 for an empty one.

    Args:
        features: ``[N, D]``.
        text: ``[L, D]``.

    Returns:
        float32 ``[N]``.

    Example:
        >>> llm_relevance(torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    # The sum points where the mean does, and exists without words too.
    return normalised(features) @ normalised(text.float().sum(dim=0))


def clip_relevance(patches: Tensor, texts: Tensor) -> Tensor:
    """Average the negative cosine similarity of patches over the segments of the question.

    Args:
        patches: ``[..., N, E]``.
        texts: ``[M, E]``.

    Returns:
        float32 ``[..., N]``.

    Example:
        >>> clip_relevance(torch.eye(2), torch.tensor([[1.0, 0.0]])).tolist()
        [-1.0, -0.0]
    """
    return -(normalised(patches) @ normalised(texts).T).mean(dim=-1)


def scaled_relevance(raw: Tensor) -> Tensor:
    """Scale to [0, 1], all entries together; the lowest stays a little above zero.

    Example:
        >>> [round(value, 3) for value in scaled_relevance(torch.tensor([1.0, 3.0, 2.0])).tolist()]
        [0.0, 1.0, 0.5]
        >>> scaled_relevance(torch.tensor([2.0, 2.0])).tolist()
        [1.0, 1.0]
    """
    span = raw.max() - raw.min()
    if float(span) <= 0.0:
        return torch.ones_like(raw)
    return (raw - raw.min() + 1e-6) / span


def likeliest_subset(features: Tensor, relevance: Tensor, kept: int) -> Tensor:
    """Choose greedily the subset whose kernel has the largest determinant.

    Once the features span no new direction every determinant is zero; the most relevant of what is left then
    follow, where the official code divides by zero.

    Args:
        features: ``[N, D]``.
        relevance: ``[N]`` float32, 0 or more.
        kept: how many.

    Returns:
        ``[kept]`` int64 in the order of the choice; ties go to the lower index.

    Example:
        >>> likeliest_subset(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.ones(3), 2).tolist()
        [0, 2]
    """
    return conditional_dpp(features[None], relevance[None], kept)[0]
