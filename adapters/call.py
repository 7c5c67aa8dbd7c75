"""The state of one forward pass through a pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfast.adapters.masks import gather_rows, pack
from mmfast.adapters.media import Segment
from mmfast.kv.cache import Announcement
from mmfast.token_pruning.layers import LayerEvent
from mmfast.token_pruning.weights import Lesson
from mmfast.tokens import Layout


@dataclass(frozen=True)
class Level:
    """The tokens alive between two reductions; all tensors are ``[B, K]``.

    Attributes:
        slots: int64 place of each token in the prompt as the user passed it.
        real: bool, which tokens are real and not padding; None = all.
        entry: int64 place among the tokens with which the decoder was entered; None at the entrance.
        whole: nothing of the prompt is missing.
        positions: position ids where they differ from gathering those of the decoder; None = gather.
    """

    slots: Tensor
    real: Tensor | None
    entry: Tensor | None = None
    whole: bool = False
    positions: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens K, padding included."""
        return int(self.slots.shape[1])

    def counts(self) -> list[int]:
        """Real tokens per row."""
        if self.real is None:
            return [self.length] * self.slots.shape[0]
        return [int(value) for value in self.real.sum(dim=1).tolist()]

    def narrow(self, keep: Tensor) -> tuple[Level, Tensor]:
        """Keep the ``[B, K]`` bool chosen tokens; also return ``[B, K']`` their places in this level."""
        step, real = pack(keep)
        entry = step if self.entry is None else self.entry.gather(1, step)
        return Level(self.slots.gather(1, step), real, entry), step

    def stretch(self, states: Tensor, length: int) -> Tensor:
        """Give every place of the full prompt the state of the nearest kept token at or before it.

        Args:
            states: ``[B, K, D]``.
            length: length S of the full prompt.

        Returns:
            ``[B, S, D]``.
        """
        batch, kept = self.slots.shape
        present = torch.zeros(batch, length, dtype=torch.int64, device=states.device)
        real = torch.ones_like(self.slots) if self.real is None else self.real.long()
        present.scatter_add_(1, self.slots.to(states.device), real.to(states.device))
        counts = present.sum(dim=1, keepdim=True)
        # Real tokens are packed to the right, so the r-th of them stands at kept - count + r.
        rank = (present.cumsum(dim=1) - 1).clamp_min(0)
        places = (rank + kept - counts).clamp(0, kept - 1)
        return gather_rows(states, places)


@dataclass
class Outer:
    """What the outer model was called with.

    Attributes:
        visual: modality -> ``[B, S]`` bool placeholders, if the call brings features; else empty.
        layouts: modality -> layouts of its images or videos.
        attention_mask: 2-D mask of the user or None.
        input_ids: token ids or None.
        features: the object that brings the features, to tell whether two calls bring the same.
        untagged: modality of precomputed features of which nothing is known, if any.
    """

    visual: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    attention_mask: Tensor | None = None
    input_ids: Tensor | None = None
    features: Any = None
    untagged: str = ""

    def valid(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Say which of the last tokens are real, bool ``[B, S]``."""
        if self.attention_mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        return self.attention_mask[:, -length:].to(device).bool()


@dataclass(frozen=True)
class Block:
    """Drafted tokens that one call verifies.

    Attributes:
        depth: ``[B, q]`` int64, how many tokens stand between each token and the last one in the cache.
        lengths: ``[B]`` int64, logical length of each row before the call.
        sees: ``[B, q, q]`` bool, which tokens of the call each one sees; None = those before it and itself.
    """

    depth: Tensor
    lengths: Tensor
    sees: Tensor | None

    def slots(self, seen: int) -> Tensor:
        """Return ``[B, q]`` places of the tokens, counted from the ``seen`` of a cache."""
        return self.depth + (self.lengths - seen)[:, None]

    def visible(self) -> Tensor:
        """Return ``[B, q, q]`` bool, which tokens of the call each one sees."""
        if self.sees is not None:
            return self.sees
        batch, query = self.depth.shape
        return torch.ones(query, query, dtype=torch.bool, device=self.depth.device).tril().expand(batch, -1, -1)


@dataclass
class Inner:
    """One pass through the decoder.

    Attributes:
        length: tokens of this call as the user passed them, S.
        levels: layer index at which it begins -> level, ascending; 0 is the entrance.
        segments: per row, its images and videos.
        input_ids: ``[B, S]`` token ids of a prompt that brings images or videos, where it has any.
        candidate: ``[B, S]`` bool, visual tokens that layers may drop.
        number: ``[B, S]`` int64, number of each candidate among those that entered.
        media: ``[B, S]`` int64, image or video each candidate belongs to.
        media_totals: per row, candidates that entered per image or video.
        deepstack: features to add after the first layers, one ``[V, D]`` tensor each.
        deepstack_visual: ``[B, S]`` bool places of those features.
        events: reductions inside the stack, by layer.
        bypass_layers: layers around which tokens may go in this call.
        routed: layer index -> the tokens that take part in it, where some go around it.
        attending: layer index -> the tokens that attend in it, where that is less than what is alive.
        fed: layers whose feed-forward part works on all tokens alive all the same.
        embeds: ``[B, S, D]`` embeddings of the prompt, merged features in place, if a method wants them.
        layouts: per row and image or video, where the tokens that entered lie (no newline tokens).
        sizes: ``[B, S]`` float32, how many tokens each visual token stands for; None = one each.
        memory: per row, what the method remembers from one event to the next.
        cache: the cache or None.
        seen: logical tokens before this call.
        prompt_end: place of the last prompt token, where generated or drafted tokens follow it in the same call.
        base_shift: ``[B]`` int64 by which positions are lowered already; None = 0.
        first_slots: ``[B]`` int64, place of the first real token of each row.
        undo: callbacks that end the call.
        selection_marks: begin and end marks of selections.
        block: the drafted tokens, if the call verifies some.
        lesson: what methods are to know of a call in training.
    """

    length: int
    levels: dict[int, Level]
    segments: list[list[Segment]] = field(default_factory=list)
    input_ids: Tensor | None = None
    candidate: Tensor | None = None
    number: Tensor | None = None
    media: Tensor | None = None
    media_totals: list[tuple[int, ...]] = field(default_factory=list)
    deepstack: list[Tensor] = field(default_factory=list)
    deepstack_visual: Tensor | None = None
    events: dict[int, LayerEvent] = field(default_factory=dict)
    bypass_layers: frozenset[int] = frozenset()
    routed: dict[int, Level] = field(default_factory=dict)
    attending: dict[int, Level] = field(default_factory=dict)
    fed: set[int] = field(default_factory=set)
    embeds: Tensor | None = None
    layouts: list[tuple[Layout, ...]] = field(default_factory=list)
    sizes: Tensor | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)
    cache: Any = None
    seen: int = 0
    prompt_end: int | None = None
    base_shift: Tensor | None = None
    first_slots: list[int] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)
    selection_marks: list[tuple[Any, Any]] = field(default_factory=list)
    tables: dict[Any, Any] = field(default_factory=dict)
    block: Block | None = None
    lesson: Lesson | None = None

    @property
    def gates_learn(self) -> bool:
        """Whether learned parts follow their training form in this call."""
        return self.lesson is not None and self.lesson.gates

    @property
    def ends(self) -> int | Tensor | None:
        """Place of the last prompt token, one for all rows or ``[B, 1]``, where more follows it in the same call."""
        taught = None if self.lesson is None else self.lesson.ends
        return self.prompt_end if taught is None else taught

    def level_at(self, layer: int) -> Level:
        """Return the level of the tokens that are alive at a layer."""
        return self.levels[max(start for start in self.levels if start <= layer)]

    def reads_at(self, layer: int) -> Level:
        """Return the level of the tokens that take part in a layer."""
        return self.routed.get(layer) or self.level_at(layer)

    def first_slot(self, row: int) -> int:
        """Return how much padding stands before a prompt."""
        return self.first_slots[row] if self.first_slots else 0

    def remembered(self, key: Any, build: Any) -> Any:
        """Build a gathered table once per level."""
        if key not in self.tables:
            self.tables[key] = build()
        return self.tables[key]


class Onlooker(Protocol):
    """Who wants to know what enters the decoder, and what leaves it."""

    def entered(self, inner: Inner, kwargs: Mapping[str, Any]) -> None:
        """Note the arguments of the decoder."""

    def left(self, inner: Inner, output: Any) -> None:
        """Note its output, before it is stretched to the length of the prompt."""


def announcement(inner: Inner, index: int) -> Announcement:
    """Announce to one cache layer the tokens that enter its decoder layer."""
    if index in inner.routed:
        level = inner.routed[index]
        # No other layer reads the same tokens: its books are its own. (The hashes of -1 and -2 are equal.)
        return Announcement(inner.length, level.real, level.slots, -2 - index)
    start = max(begin for begin in inner.levels if begin <= index)
    level = inner.levels[start]
    sizes = None if inner.sizes is None else inner.sizes.gather(1, level.slots.to(inner.sizes.device))
    return Announcement(inner.length, level.real, level.slots, start, sizes)


def compact_positions(positions: Tensor, real: Tensor | None, first: Tensor) -> Tensor:
    """Number the real tokens of each row consecutively from ``first``.

    Args:
        positions: ``[B, K]`` int64, for shape, dtype and device.
        real: ``[B, K]`` bool; None = all.
        first: ``[B]`` int64, the position of the first real token.

    Example:
        >>> compact_positions(torch.zeros(1, 3, dtype=torch.long), None, torch.tensor([5])).tolist()
        [[5, 6, 7]]
    """
    present = torch.ones_like(positions) if real is None else real.to(positions.dtype)
    return (present.cumsum(dim=1) - 1).clamp_min(0) + first[:, None]


def stretched(output: Any, inner: Inner, depth: int) -> Any:
    """Give the decoder's output the length of the prompt again."""
    last = inner.level_at(depth - 1)
    if isinstance(output, tuple):
        return (last.stretch(output[0], inner.length), *output[1:])
    output.last_hidden_state = last.stretch(output.last_hidden_state, inner.length)
    hidden = getattr(output, "hidden_states", None)
    if hidden is not None:
        levels = [inner.level_at(layer) for layer in range(depth)] + [last]
        output.hidden_states = tuple(
            _by_length(states, level, inner) for states, level in zip(hidden, levels, strict=True)
        )
    return output


def _by_length(states: Tensor, level: Level, inner: Inner) -> Tensor:
    """Stretch one layer's states; the input of an event layer still has the level before."""
    if states.shape[1] != level.length:
        level = next(other for other in inner.levels.values() if other.length == states.shape[1])
    return states if level.whole else level.stretch(states, inner.length)
