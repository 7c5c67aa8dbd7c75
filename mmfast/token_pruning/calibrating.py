"""What a method does to be fitted to a model, and what it may ask of the model for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmfast.budget import LanguageShape
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.layers import LayerDropper, LayerEvent, LayerRequest, LayerTokens

Look = Callable[[LayerTokens, LayerEvent], None]
"""Looks at the tokens of one prompt at the input of one layer."""


class Bench(Protocol):
    """A model and sample prompts on which a method may try out settings of its own."""

    @property
    def shape(self) -> LanguageShape:
        """Sizes of the language model."""

    def divergence(self, method: Method) -> float:
        """Run all prompts with and without a method.

        Returns:
            The mean Kullback-Leibler divergence of the next token with the method from that without it.
        """

    def watch(self, look: Look) -> None:
        """Run all prompts and show their tokens at every layer but the first, with the attention of the layer before.

        Nothing is dropped.
        """


@runtime_checkable
class Calibrated(Protocol):
    """A method that can be fitted to a model: all that :func:`mmfast.calibrate` knows of it."""

    def calibrated(self, bench: Bench, keep: int | float | None) -> Method:
        """Return the method as it suits the model of the bench.

        Args:
            bench: what may be tried.
            keep: the budget that the user named; None leaves it as it is.

        Raises:
            ValueError: if the budget does not go with the calibration.
        """


@dataclass(frozen=True)
class Observer(LayerDropper):
    """Look at the tokens of each prompt at every layer but the first, and drop none.

    Attributes:
        look: called with them.
    """

    name = "observer"
    stage = "in_llm"
    needs = frozenset({"attention"})

    look: Look = field(kw_only=True)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer but the first."""
        return [LayerEvent(layer, layer - 1, depth) for layer in range(1, depth)]

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the layer before."""
        return LayerRequest(event.layer - 1)

    def counts(self, total: int, depth: int, images: int = 1) -> None:
        """Leave the count open, so that no event is skipped."""
        return

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Look, and keep everything."""
        self.look(tokens, event)
        return torch.arange(tokens.candidates.numel(), device=tokens.candidates.device)
