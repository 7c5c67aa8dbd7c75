"""Dynamic-LLaVA's second half: a small network decides which generated tokens are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from mmfast.budget import resolve_layer
from mmfast.kv.base import Forgetter
from mmfast.registry import register
from mmfast.token_pruning.in_llm.dynamic_llava import DynamicLlava


@register(
    "dynamic_llava_decode",
    stage="cache",
    paper="arXiv 2412.00876",
    source="Osilly/dynamic_llava",
    training_free=False,
)
@dataclass(frozen=True)
class DynamicLlavaDecode(Forgetter):
    """Forget generated tokens that a small network, looking at their hidden state, finds not worth keeping.

    Each still attends to itself, and layers before ``layer`` remember all of them. Rows of a batch decide one
    by one. Meant to stand beside ``dynamic_llava(...)``, with the same weights. Without ``weights`` the network is
    random (mechanics only).

    Paper: "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
    Sparsification", ICLR 2025.

    Attributes:
        layer: first layer that forgets, as index (int) or relative depth (float).
        predictor_width: inner width of the network, a multiple of 4 and of ``predictor_heads``.
        predictor_heads: attention heads of its sister for visual tokens.
        weights: path of a safetensors file with the trained predictors; empty = untrained.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    layer: int | float = 2
    predictor_width: int = 512
    predictor_heads: int = 8
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The method for visual tokens checks the options, and holds both networks.
        _ = self.whole

    @cached_property
    def whole(self) -> DynamicLlava:
        """The method that decides about visual tokens, with the same networks."""
        return DynamicLlava(
            layer=self.layer,
            predictor_width=self.predictor_width,
            predictor_heads=self.predictor_heads,
            weights=self.weights,
        )

    def first_layer(self, depth: int) -> int:
        """Return the first layer that forgets."""
        return resolve_layer(self.layer, depth)

    def remember(self, hidden: Tensor) -> Tensor:
        """Say which new tokens stay, bool ``[B]``, given their states ``[B, D]`` at the input of that layer."""
        return self.whole.decode_keep(hidden)
