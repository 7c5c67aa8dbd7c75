"""ToMe: join the most similar pairs of tokens, weighing each by what it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.bipartite_merge import bipartite_merge
from mmfast.registry import register
from mmfast.token_pruning.encoder_base import EncoderMerger, EncoderTokens, encoder_groups, merge_rows
from mmfast.token_pruning.similarity import halvings, merged_keep
from mmfast.tokens import Keep, VisualTokens


@register("tome", stage="before_llm", paper="arXiv 2210.09461", source="facebookresearch/ToMe", vectors=True)
@dataclass(frozen=True)
class ToMe(EncoderMerger):
    """Join the most similar pairs of tokens, round after round; averages are weighted by size.

    Each round pairs the tokens at even places with those at odd places and joins the most similar pairs, at
    most half of the tokens. On the encoder's output similarity is that of the features; inside the encoder,
    after each block but the last it is that of the block's keys.

    Paper: "Token Merging: Your ViT But Faster", ICLR 2023.

    Attributes:
        where: ``"output"`` merges visual tokens; ``"encoder"`` merges about equally many after each block of
            the vision encoder, which then runs on fewer tokens; None takes the encoder where the model allows.
        proportional: inside the encoder, raise the attention to a token by log(size).
    """

    where: Literal["encoder", "output"] | None = "output"
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.proportional, bool):
            raise ValueError(f"proportional={self.proportional!r} must be True or False")

    @property
    def weighs(self) -> bool:
        """As ``proportional`` says."""
        return self.proportional

    def schedule(self, blocks: int, patches: int, kept: int) -> Mapping[int, int]:
        """Spread the merges evenly over the blocks.

        Example:
            >>> ToMe().schedule(4, 16, 6)
            {0: 14, 1: 11, 2: 9, 3: 6}
        """
        return {block: patches - (block + 1) * (patches - kept) // blocks for block in range(blocks)}

    def merge_block(self, tokens: EncoderTokens, left: int) -> tuple[Tensor, Tensor]:
        """Join the tokens with the most similar keys."""
        rounds = halvings(tokens.keys.shape[0], left, protected=int(tokens.class_token))
        return match_rounds(tokens.keys, rounds, tokens.sizes, class_token=tokens.class_token)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Merge until ``kept`` tokens are left; each stands at the place of the token the others joined."""
        slots, group = encoder_groups(tokens)
        sizes = torch.bincount(group, minlength=slots.numel()).float()
        features = tokens.features[slots]
        places, joined = match_rounds(features, halvings(slots.numel(), kept), sizes)
        merged, summed = merge_rows(features, sizes, joined, places.numel())
        return merged_keep(slots[places], merged, summed, joined[group])


def match_rounds(
    metric: Tensor, rounds: Iterable[int], sizes: Tensor | None = None, *, class_token: bool = False
) -> tuple[Tensor, Tensor]:
    """Join similar tokens in several rounds; between rounds the metric is averaged as the features will be.

    Args:
        metric: ``[N, d]``.
        rounds: how many tokens each round joins; at most half of those there are.
        sizes: float32 ``[N]``, or None for ones.
        class_token: the first token takes no part and stays the first.

    Returns:
        As :func:`~mmfast.kernels.bipartite_merge.bipartite_match` without a batch, over all rounds.

    Example:
        >>> places, source = match_rounds(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.2], [0.0, 1.0]]), [1, 1])
        >>> places.tolist(), source.tolist()
        ([3, 1], [1, 1, 1, 0])
    """
    metric = metric.float()
    sizes = torch.ones_like(metric[:, 0]) if sizes is None else sizes
    places = source = torch.arange(metric.shape[0], device=metric.device)
    for merges in rounds:
        round_ = bipartite_merge(metric[None], merges, sizes=sizes[None], class_token=class_token)
        metric, sizes, stays, joined = (part[0] for part in round_)
        places, source = places[stays], joined[source]
    return places, source
