"""Random dropping: the baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector
from mmfast.tokens import VisualTokens


@register("random", stage="before_llm")
@dataclass(frozen=True)
class Random(Selector):
    """Keep a random subset, the same one for the same seed.

    The draw depends on ``seed``, on the number of tokens and on which image of its prompt this is,
    so a batch gives what its prompts give one by one.

    Attributes:
        seed: seed of the draw; report at least three.
    """

    seed: int = 0

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return a random subset."""
        return random_subset(len(tokens), kept, self.seed, tokens.index).to(tokens.features.device)


def random_subset(total: int, kept: int, *seeds: int) -> Tensor:
    """Draw ``kept`` of ``total`` indices from a generator of its own.

    Returns:
        int64 ``[kept]`` on the CPU.

    Example:
        >>> random_subset(9, 3, 0).tolist() == random_subset(9, 3, 0).tolist()
        True
    """
    generator = torch.Generator()
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % (1 << 63)
    generator.manual_seed(mixed)
    return torch.randperm(total, generator=generator)[:kept]
