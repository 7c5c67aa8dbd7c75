"""H2O: the entries that have received most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Evictor, top_mask
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.streaming_llm import evicted, limit_of, own_places, remember_stored
from mmfast.registry import register


@register("h2o", stage="cache", paper="arXiv 2306.14048", source="FMInference/H2O", vectors=True)
@dataclass(frozen=True)
class H2O(Evictor):
    """Keep the entries that all tokens so far attended to most, and the newest ones; one goes in each decode step.

    What an entry has received is carried on from step to step. Sums favour early entries, which more
    tokens could see. Query heads that share a key/value head are averaged. With ``keep=1.0`` nothing goes,
    in decode steps either; a count is a limit that generated tokens fill up too.

    Paper: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models".

    Attributes:
        keep: entries per head.
        recent: share of them that are the newest.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recent", self.recent)

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        retained = super().__call__(entries)
        if retained is None:
            remember_stored(entries.memory, len(entries), limit_of(self, len(entries)))
            entries.memory["received"] = received(entries)
        return retained

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the heaviest and the newest entries, and remember what they have received."""
        scores = received(entries)
        mask = heavy_and_recent(scores, kept, recent_count(self.recent, kept))
        remember_stored(entries.memory, kept, kept)
        entries.memory["received"] = scores[mask].view(entries.heads, kept)
        return Retained(mask)

    def step(self, step: Step) -> Tensor | None:
        """Add what the new token attends to; the lightest entry that is not among the newest goes."""
        if "received" not in step.memory:
            return None
        carried = step.memory["received"][:, -int(step.memory["stored"]) :]
        places = own_places(step)
        stored = places.shape[-1]
        # Tokens that came without a step, or were taken back, have left the sums behind.
        carried = carried[:, : stored - 1]
        carried = functional.pad(carried, (0, stored - carried.shape[-1]))
        scores = carried + step.probabilities().unflatten(0, (step.heads, -1)).mean(dim=1).gather(1, places)
        if "limit" not in step.memory or stored <= int(step.memory["limit"]):
            step.memory["received"] = scores
            return None
        limit = int(step.memory["limit"])
        # Sums are narrowed with everything that is stored, so they have to be as many.
        step.memory["received"] = scores.new_zeros(step.heads, len(step)).scatter(1, places, scores)
        return evicted(step, places, heavy_and_recent(scores, limit, recent_count(self.recent, limit)))


def received(entries: Entries, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """Add up what each entry receives from all tokens of the prompt.

    Args:
        entries: the entries.
        reduce: how query heads that share a key/value head are put together.

    Returns:
        float32 ``[G, n]``, finite.
    """
    weights = torch.ones(len(entries), device=entries.keys.device)
    return torch.nan_to_num(entries.per_group(entries.view.column_sums(weights, heads="each"), reduce))


def heavy_and_recent(scores: Tensor, kept: int, recent: int) -> Tensor:
    """Mark the last ``recent`` entries and the highest scores before them, ``kept`` in all.

    Args:
        scores: ``[G, n]``.
        kept: how many.
        recent: at most ``kept``.

    Returns:
        bool ``[G, n]``.

    Example:
        >>> heavy_and_recent(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2, 1).tolist()
        [[False, True, False, True]]
    """
    before = scores.shape[-1] - recent
    return functional.pad(top_mask(scores[..., :before], kept - recent), (0, recent), value=True)


def recent_count(share: float, kept: int) -> int:
    """Say how many of ``kept`` entries are the newest, rounded.

    Example:
        >>> recent_count(0.5, 20), recent_count(1 / 3, 24)
        (10, 8)
    """
    return round(share * kept)


def check_share(name: str, value: object) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: naming field and value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie between 0 and 1: a share")
