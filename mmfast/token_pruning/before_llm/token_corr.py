"""Token-level correlation: a quota from how much patches repeat each other, filled by attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.similarity import highest_first, normalised, outliers, row_blocks
from mmfast.tokens import VisualTokens


@register("token_corr", stage="before_llm", paper="arXiv 2407.14439")
@dataclass(frozen=True)
class TokenCorrelation(Selector):
    """Keep patches that stand out for a deep block, and a sample of the rest by a shallow one.

    Patches whose keys resemble those of many others are redundant; the share that is not says how many tokens a
    crop of a document needs (``keep=None``). Outliers of the class token's attention in a deep block always stay;
    the quota is filled by sampling without replacement in proportion to the attention of a shallow block.

    No official code is public: thresholds and layers are ours. The paper reports small savings without
    fine-tuning.

    Paper: "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding".

    Attributes:
        similarity: cosine similarity of keys above which two patches repeat each other, in (0, 1).
        repeats: share of the patches that must repeat one for it to be redundant, in (0, 1).
        shallow_layer: block for the sampling, index or relative depth.
        deterministic: take the best by the shallow block instead of sampling.
        seed: seed of the sampling.
    """

    needs = frozenset({"cls_attention", "keys"})
    adaptive = True

    keep: int | float | None = None
    scope: Literal["global", "per_tile"] = "global"
    similarity: float = 0.8
    repeats: float = 0.125
    shallow_layer: int | float = 0.125
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("similarity", "repeats"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1)")
        if self.keep is None and self.scope == "per_tile":
            raise ValueError("keep=None counts over the whole image; use scope='global', or give keep")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for keys and the attention of the class token in two blocks."""
        return {
            "keys": VisionSignal("keys", heads="join"),
            "shallow": VisionSignal("cls_attention", self.shallow_layer),
            "deep": VisionSignal("cls_attention"),
        }

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the patches that are not redundant."""
        return max(1, int((~repeated(tokens.signals["keys"], self.similarity, self.repeats)).sum()))

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Take the outliers, then sample."""
        deep, shallow = tokens.signals["deep"].float(), tokens.signals["shallow"].float()
        standing_out = outliers(deep)
        first = highest_first(deep, min(int(standing_out.sum()), kept))
        rest = torch.ones_like(standing_out)
        rest[first] = False
        places = rest.nonzero().squeeze(-1)
        wanted = kept - first.numel()
        if wanted == 0:
            return first
        weights = shallow[places]
        if not self.deterministic:
            weights = sampling_keys(weights, self.seed, len(tokens), tokens.index)
        return torch.cat([first, places[highest_first(weights, wanted)]])


def repeated(keys: Tensor, similarity: float, share: float) -> Tensor:
    """Say which patches resemble more than a share of all others.

    Args:
        keys: ``[N, C]``.
        similarity: cosine similarity above which two patches count as alike.
        share: of the N patches.

    Returns:
        bool ``[N]``.

    Example:
        >>> repeated(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]), 0.8, 0.2).tolist()
        [True, True, False]
    """
    unit = normalised(keys)
    total = unit.shape[0]
    counts = [((unit[part] @ unit.T) > similarity).sum(dim=1) - 1 for part in row_blocks(total, total)]
    return torch.cat(counts) > share * total


def sampling_keys(weights: Tensor, *seeds: int) -> Tensor:
    """Draw keys of which the highest are a weighted sample without replacement (exponential races).

    Args:
        weights: ``[N]`` float32, 0 or more.
        seeds: numbers from which the draw follows.

    Returns:
        float32 ``[N]``, 0 or less; those of weight zero come after all others.

    Example:
        >>> keys = sampling_keys(torch.tensor([1.0, 1000.0]), 0)
        >>> keys.argmax().item()
        1
    """
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    uniform = torch.rand(weights.shape[0], generator=generator, dtype=torch.float64).clamp_min(1e-300)
    keys = uniform.log().to(weights.device) / weights.double().clamp_min(1e-30)
    return keys.float()
