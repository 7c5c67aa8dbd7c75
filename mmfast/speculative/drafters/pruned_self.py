"""The model drafts on a copy of its cache that has lost most of the visual tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mmfast.budget import check_keep
from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, Request, Session, check_count
from mmfast.speculative.drafters.swift import (
    SelfModel,
    SkippingSession,
    check_share,
    few_layers,
    search_of,
)
from mmfast.token_pruning.base import check_choice

_WORTHWHILE = 1.05


class PrunableModel(SelfModel, Protocol):
    """A model that can draft on a part of its cache."""

    weight_bytes: int
    """Bytes of the weights that every step reads."""
    cache_bytes: int
    """Bytes of keys and values that every step reads."""

    def visual(self) -> list[Tensor]:
        """Return per row the places of the visual tokens, ``[N]`` int64."""

    def scores(self) -> list[Tensor]:
        """Return per row the attention that the text behind images gave each, ``[N]`` float32."""

    def part(self, kept: Sequence[Tensor]) -> PartModel:
        """Copy the cache with some of the visual tokens."""


class PartModel(PrunableModel, Protocol):
    """A model with a copy of a part of its cache."""

    def follow(self) -> None:
        """Copy what the model has stored since of the answers."""


@dataclass(frozen=True)
class Selection:
    """The visual tokens a drafter keeps, all ``[m]`` int64, ascending.

    Attributes:
        attended: chosen by attention.
        uniform: chosen evenly from the others.
    """

    attended: Tensor
    uniform: Tensor

    @property
    def indices(self) -> Tensor:
        """All of them, ascending."""
        return torch.cat([self.attended, self.uniform]).sort().values


def kept_tokens(keep: int | float, tokens: int) -> int:
    """Return how many of ``tokens`` visual tokens a drafter keeps: at least one, where there are any.

    Example:
        >>> kept_tokens(1 - 0.9, 20), kept_tokens(0.1, 3), kept_tokens(64, 20)
        (2, 1, 20)
    """
    wanted = keep if isinstance(keep, int) else math.floor(tokens * keep + 1e-9)
    return min(tokens, max(1, wanted))


def select(scores: Tensor, kept: int, percentage: float) -> Selection:
    """Choose visual tokens in two stages: those with most of the attention, then others evenly.

    Args:
        scores: ``[N]``, not negative.
        kept: tokens to choose, at most N.
        percentage: of all attention; so many tokens are chosen for it as reach that.

    Example:
        >>> found = select(torch.tensor([0.1, 0.5, 0.1, 0.1, 0.2]), 3, 0.4)
        >>> found.attended.tolist(), found.uniform.tolist()
        ([1], [0, 4])
    """
    ranked = scores.double().sort(descending=True, stable=True)
    reached = ranked.values.cumsum(dim=0) >= percentage * ranked.values.sum()
    attended = min(kept, int(reached.byte().argmax()) + 1 if bool(reached.any()) else kept)
    first = ranked.indices[:attended].sort().values
    others = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    others[first] = False
    left = others.nonzero().squeeze(-1)
    return Selection(first, left[evenly(kept - attended, len(left)).to(left.device)])


def evenly(count: int, total: int) -> Tensor:
    """Return ``count`` of ``total`` places, as far apart as can be; ``[count]`` int64.

    Example:
        >>> evenly(3, 8).tolist(), evenly(1, 8).tolist()
        ([0, 3, 7], [0])
    """
    return torch.arange(count) * (total - 1) // max(1, count - 1)


def best_speedup(num_draft: int, step_cost: float) -> float:
    """Return by how much drafting makes decoding faster if every token is accepted and verifying costs one step.

    Args:
        num_draft: tokens of a draft.
        step_cost: of the drafter, in steps of the model.

    Example:
        >>> best_speedup(4, 0.25), best_speedup(4, 1.0)
        (2.5, 1.0)
    """
    return (num_draft + 1) / (num_draft * step_cost + 1)


@register("pruned_self", stage="decode", paper="arXiv 2508.16201", source="zju-jiyicheng/SpecVLM")
@dataclass(frozen=True)
class PrunedSelf(Drafter):
    """Draft with the model itself on a copy of its cache that keeps all text and few visual tokens.

    What is kept is what the text behind the images attends to most, and others evenly. Keys and values stay as the
    prompt left them, at their places; of the answer the copy gets what the model itself stores. A step reads as many
    weights as one of the model: this pays for very long videos, in large batches, or with ``skip_ratio``.

    Paper: "SpecVLM: Enhancing Speculative Decoding of Video LLMs via Verifier-Guided Token Pruning", whose drafter
    is a smaller model (see ``assistant``); the copy of the model's own cache is ours.

    Attributes:
        num_draft: tokens of a draft at most.
        keep: visual tokens of each prompt that the drafter sees; int = count, float in (0, 1] = fraction.
        percentage: share of the attention that the first stage covers, within ``keep``.
        selection: ``"attention"`` as above, or ``"uniform"`` evenly, for which no attention is read.
        threshold: a token less likely than that is the last of its draft; 0 for none.
        skip_ratio: share of the sublayers that are left out as well; see ``swift``, which searches for them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    needs_model: ClassVar[bool] = True

    num_draft: int = 5
    keep: int | float = 0.1
    percentage: float = 0.4
    selection: Literal["attention", "uniform"] = "attention"
    threshold: float = 0.0
    skip_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_draft", self.num_draft, 1)
        check_keep(self.keep)
        check_share("percentage", self.percentage)
        check_share("threshold", self.threshold)
        check_share("skip_ratio", self.skip_ratio, highest=0.95)
        check_choice("selection", self.selection, ["attention", "uniform"])

    @property
    def most(self) -> int:
        """Tokens it proposes at most in a round, the root not counted."""
        return self.num_draft

    @property
    def reads_attention(self) -> bool:
        """Whether the attention of the prompt is read."""
        return self.selection == "attention"

    def notice(self, depth: int) -> str:
        """Say where skipping layers hardly pays."""
        return few_layers(depth) if self.skip_ratio else ""

    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``."""
        model: PrunableModel = request.model.itself()
        places = model.visual()
        if self.reads_attention:
            scores = model.scores()
            kept = [
                select(own, kept_tokens(self.keep, len(own)), self.percentage).indices if len(own) else own.long()
                for own in scores
            ]
        else:
            kept = [evenly(min(len(own), kept_tokens(self.keep, len(own))), len(own)) for own in places]
        part = model.part(kept)
        self._warn(model, part, request)
        return _PrunedSession(part, request, self)

    def _warn(self, model: PrunableModel, part: PrunableModel, request: Request) -> None:
        """Say so, once, where even drafts that are always right would not pay."""
        executed = 1 - self.skip_ratio * (model.depth - 2) / model.depth
        cost = (model.weight_bytes * executed + part.cache_bytes) / (model.weight_bytes + model.cache_bytes)
        best = best_speedup(self.num_draft, cost)
        if best < _WORTHWHILE and not request.memory.get("warned"):
            request.memory["warned"] = True
            warnings.warn(
                f"method {self.name!r}: a step of the drafter reads {cost:.0%} of what a step of the model reads, so "
                f"that decoding gets {best:.2f} times as fast at best; set skip_ratio, or keep this drafter for "
                "prompts whose cache outweighs the model",
                stacklevel=2,
            )


class _PrunedSession(SkippingSession):
    """One call of ``generate`` in which the model drafts on a part of its cache."""

    def __init__(self, model: PartModel, request: Request, drafter: PrunedSelf) -> None:
        skipping = bool(drafter.skip_ratio)
        self._part = model
        super().__init__(
            model,
            request,
            search_of(request, model, drafter.skip_ratio),
            depth=drafter.num_draft,
            threshold=drafter.threshold,
            window=32 if skipping else 0,
        )

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        """Catch up with the model and draft."""
        self._part.follow()
        return super().propose(roots, budget)
