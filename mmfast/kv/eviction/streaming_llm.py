"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Evictor
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.registry import register


@register("streaming_llm", stage="cache", paper="arXiv 2309.17453", source="mit-han-lab/streaming-llm", vectors=True)
@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Keep the first entries and the newest ones, in the prompt and in every decode step.

    Nothing but the place of an entry counts, so an image in the middle is the first to go: a baseline.
    Positions stay true, where the official code counts them inside the cache. With ``keep=1.0`` nothing
    goes, in decode steps either; a count is a limit that generated tokens fill up too.

    Paper: "Efficient Streaming Language Models with Attention Sinks".

    Attributes:
        keep: entries per head, the first ones included.
        start: number of first entries that stay; less where ``keep`` leaves no room beside them.
    """

    decodes: ClassVar[bool] = True

    start: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start)

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        retained = super().__call__(entries)
        if retained is None:
            remember_stored(entries.memory, len(entries), limit_of(self, len(entries)))
        return retained

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the two ends."""
        remember_stored(entries.memory, kept, kept)
        return Retained(without(len(entries), *self.middle(len(entries), kept), entries.keys.device))

    def middle(self, length: int, limit: int, coming: int = 0) -> tuple[int, int]:
        """Return the first entry that goes, and the first after it that stays.

        Args:
            length: entries stored.
            limit: entries that may be stored.
            coming: entries to make room for, which are not stored yet.

        Example:
            >>> StreamingLLM(start=4).middle(50, 24), StreamingLLM(start=4).middle(23, 24, coming=1)
            ((4, 30), (4, 4))
        """
        start = min(self.start, limit - 1)
        over = length + coming - limit
        return (start, min(start + over, length)) if over > 0 else (start, start)

    def step(self, step: Step) -> Tensor | None:
        """Make room for the new entry."""
        if "limit" not in step.memory:
            return None
        places, limit = own_places(step), int(step.memory["limit"])
        stored = places.shape[-1] - 1
        if stored < limit:
            return None
        room = without(stored, *self.middle(stored, limit, 1), places.device)
        return evicted(step, places, functional.pad(room, (0, 1), value=True))


def without(length: int, first: int, end: int, device: torch.device | None = None) -> Tensor:
    """Mark all entries but those from ``first`` up to ``end``, which is not among them.

    Returns:
        bool ``[length]``.

    Example:
        >>> without(5, 1, 3).tolist()
        [True, False, False, True, True]
    """
    places = torch.arange(length, device=device)
    return (places < first) | (places >= end)


def limit_of(method: Evictor, entries: int) -> int | None:
    """Say how many entries decode steps may leave of a prompt that stays whole, and of what follows it.

    Returns:
        ``keep`` as a count; None = no limit, for ``keep=1.0``.

    Example:
        >>> limit_of(StreamingLLM(keep=64), 10), limit_of(StreamingLLM(keep=1.0), 10)
        (64, None)
    """
    if isinstance(method.keep, int):
        return method.keep
    return method.keep_count(entries) if method.keep < 1 else None


def remember_stored(memory: dict[str, Tensor], stored: int, limit: int | None = None) -> None:
    """Begin to count what is stored of a prompt and what follows it.

    Args:
        memory: of the prompt in one layer.
        stored: entries that the prompt left.
        limit: entries that decode steps may leave; None = no limit.
    """
    memory["stored"], memory["added"] = torch.tensor(stored), torch.tensor(0)
    if limit is not None:
        memory["limit"] = torch.tensor(limit)


def own_places(step: Step) -> Tensor:
    """Find what is stored of the last prompt and what followed it, and go on counting.

    In a batch a prompt may have less than is stored, and before it there may be what earlier turns left.

    Returns:
        int64 ``[G, S]``, places among those stored.
    """
    if step.real is None:
        places = torch.arange(len(step), device=step.keys.device).expand(step.heads, -1)
    else:
        places = step.real.nonzero()[:, 1].view(step.heads, -1)
    stored = int(step.memory["stored"]) + step.added - int(step.memory["added"])
    remember_stored(step.memory, min(stored, places.shape[-1]))
    step.memory["added"] = torch.tensor(step.added)
    return places[:, places.shape[-1] - int(step.memory["stored"]) :]


def evicted(step: Step, places: Tensor, stays: Tensor) -> Tensor:
    """Say what stays of everything that is stored, and count it.

    Args:
        step: the step.
        places: ``[G, S]`` int64, the entries up for choice.
        stays: bool ``[S]``, or ``[G, S]`` with the same number in each head.

    Returns:
        bool ``[P]`` or ``[G, P]``.
    """
    step.memory["stored"] = stays.sum(dim=-1).flatten()[0].cpu()
    whole = torch.ones(*stays.shape[:-1], len(step), dtype=torch.bool, device=places.device)
    return whole.scatter(-1, places if stays.ndim == 2 else places[0], stays)


def check_start(start: object) -> None:
    """Refuse a number of first entries that is none.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start={start!r} must be an int of at least 0: first entries that always stay")
