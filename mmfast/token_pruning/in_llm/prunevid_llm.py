"""PruneVid, its part inside the language model: keep what the question looks at in each frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import shares
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice
from mmfast.token_pruning.layers import DropOnce, LayerDropper, LayerEvent, LayerRequest, LayerTokens
from mmfast.token_pruning.similarity import highest_first


@register("prunevid_llm", stage="in_llm", paper="arXiv 2412.16117", source="Visual-AI/PruneVid", vectors=True)
@dataclass(frozen=True)
class PruneVidLLM(DropOnce, LayerDropper):
    """Keep in every frame the tokens that some word of the question looks at most, in some head.

    The part of PruneVid before the language model is ``prunevid``. Its static tokens stand in the first frame of
    their scene and compete with the other tokens there; the official code gives them a share of their own. The
    paper keeps 0.4 after layer 10 of 32, which is the default.

    Paper: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", ACL 2025 Findings.

    Attributes:
        truncate_cache: after the prefill, cut the caches of the layers before down to the survivors as well.
        compat: ``"official"`` cuts off the share of each frame, so that the number left is a little less than
            ``keep``.
    """

    needs = frozenset({"attention"})

    keep: int | float | None = 0.4
    layer: int | float = 11 / 32
    truncate_cache: bool = True
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        if self.compat == "official" and not isinstance(self.keep, float):
            raise ValueError(f"compat='official' takes a share of each frame; give keep={self.keep!r} as a fraction")

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the attention of the layer before."""
        return LayerRequest(event.layer - 1)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Return what is left; None where it depends on the frames."""
        return None if self.compat == "official" else super().counts(total, depth, images)

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        """Cut the caches of all layers before, if asked for."""
        layer = self.events(depth)[0].layer
        return [(layer, 0, layer)] if self.truncate_cache else []

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Share the count among the frames and keep the best of each."""
        group = frame_of(tokens)
        sizes = torch.bincount(group).tolist()
        counts = shares(kept, sizes) if kept is not None else [int(float(self.keep or 0) * size) for size in sizes]
        return best_per_group(largest_attention(tokens), group, counts)


def frame_of(tokens: LayerTokens) -> Tensor:
    """Number the frames of all images and videos of a prompt, as far as candidates of them are left.

    Returns:
        int64 ``[V]`` in ``0..F-1``; images, and videos whose layout is not known, count as one frame.
    """
    frame = torch.zeros_like(tokens.media)
    if tokens.layouts:
        of_all = torch.cat([layout.frame for layout in tokens.layouts]).to(frame.device)
        frame = of_all[tokens.origin]
    group: Tensor = torch.stack([tokens.media, frame], dim=-1).unique(dim=0, return_inverse=True)[1]
    return group


def largest_attention(tokens: LayerTokens) -> Tensor:
    """Find the largest attention that any head of any text token after the visual ones gives to each candidate.

    Returns:
        float32 ``[V]``.

    Raises:
        ValueError: if attention was not asked for.
    """
    largest = torch.zeros(tokens.hidden.shape[0], device=tokens.hidden.device)
    for _, rows in tokens.view().blocks(tokens.question):
        torch.maximum(largest, rows.amax(dim=(0, 1)), out=largest)
    return largest[tokens.candidates]


def best_per_group(score: Tensor, group: Tensor, counts: list[int]) -> Tensor:
    """Return the tokens of highest score in each group, ascending; ties go to the lower index.

    Args:
        score: ``[V]``.
        group: int64 ``[V]``.
        counts: how many of each group.

    Example:
        >>> best_per_group(torch.tensor([0.1, 0.3, 0.2, 0.9]), torch.tensor([0, 0, 0, 1]), [2, 0]).tolist()
        [1, 2]
    """
    order = highest_first(score, score.numel())
    order = order[group[order].sort(stable=True).indices]
    sizes = torch.bincount(group, minlength=len(counts))
    rank = torch.arange(order.numel(), device=order.device) - (sizes.cumsum(0) - sizes)[group[order]]
    wanted = torch.tensor(counts, device=order.device)[group[order]]
    return order[rank < wanted].sort().values
