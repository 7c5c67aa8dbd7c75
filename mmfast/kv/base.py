"""The kinds of method that act on cached keys and values: what each receives, and what it returns.

A method sees the entries of ONE prompt in ONE layer, without padding, and returns a decision. The cache
layers carry it out and keep the books.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmfast.budget import check_keep
from mmfast.kernels.words import Codes
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.registry import parse_node, parse_text
from mmfast.token_pruning.base import Method, check_choice


@dataclass(frozen=True)
class CacheMethod(Method):
    """Base of the methods of the cache."""

    kind: ClassVar[str] = "CacheMethod"
    ragged: ClassVar[bool] = False
    """Whether heads of one layer may keep different numbers of entries, so that attention needs a mask per head."""
    decodes: ClassVar[bool] = False
    """Whether it acts in every decode step too."""


@dataclass(frozen=True)
class Evictor(CacheMethod):
    """Decide which entries of a prompt stay, once, when a layer has read the prompt.

    Attributes:
        keep: what survives in each layer and head; int = entries of the prompt, float in (0, 1] = fraction of
            them, cut off.
    """

    kind: ClassVar[str] = "Evictor"

    keep: int | float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def keep_count(self, entries: int) -> int:
        """Say how many of ``entries`` stay, on average over heads and layers; the promise that tests hold."""
        wanted = self.keep if isinstance(self.keep, int) else int(self.keep * entries)
        return min(max(1, wanted), entries)

    def layer_count(self, entries: int, layer: int, depth: int) -> int:
        """Say how many of ``entries`` stay in one layer, on average over its heads."""
        return self.keep_count(entries)

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Predict how many entries of a prompt one layer holds per head; None where the data decide.

        Args:
            visual: visual tokens that the layer read.
            text: all others.
            layer: index of the layer.
            depth: number of layers.
        """
        return self.layer_count(visual + text, layer, depth)

    @abstractmethod
    def retain(self, entries: Entries, kept: int) -> Retained:
        """Choose ``kept`` entries; 1 <= kept < len(entries)."""

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        kept = self.layer_count(len(entries), entries.layer, entries.depth)
        return None if kept >= len(entries) else self.retain(entries, kept)

    def step(self, step: Step) -> Tensor | None:
        """Decide after a decode step, where ``decodes`` is set.

        Returns:
            bool ``[P]`` or ``[G, P]`` of what stays; None = all.
        """
        return None


@dataclass(frozen=True)
class CacheScorer(Evictor):
    """Give each entry a score; the highest survive in each head, ties going to the earlier entry.

    Attributes:
        entries: ``"all"`` lets every entry of the prompt compete; ``"visual"`` leaves text alone, and ``keep``
            counts visual entries only.
    """

    kind: ClassVar[str] = "CacheScorer"

    entries: Literal["all", "visual"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("entries", self.entries, ["all", "visual"])

    @abstractmethod
    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return float32 ``[n]`` (one choice for all heads) or ``[G, n]``; plus infinity forces an entry.

        Args:
            entries: the entries.
            kept: how many will stay, for methods that force some of them by a share of the budget.
        """

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Predict how many entries of a prompt one layer holds per head."""
        if self.entries == "all":
            return super().entry_counts(visual, text, layer, depth)
        return text + (self.layer_count(visual, layer, depth) if visual else 0)

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        if self.entries == "all":
            return super().__call__(entries)
        visual = int(entries.visual.sum())
        count = self.layer_count(visual, entries.layer, entries.depth) if visual else 0
        return None if count >= visual else self.retain(entries, count + len(entries) - visual)

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the entries of highest score."""
        return Retained(top_mask(self.scores(entries, kept), kept))

    def scores(self, entries: Entries, kept: int) -> Tensor:
        """Return the scores as they are ranked, text forced where it does not compete."""
        score = torch.nan_to_num(self.score(entries, kept).float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self.entries == "all":
            return score
        # What is forced among the visual entries comes after text all the same.
        return score.clamp_max(torch.finfo(score.dtype).max).masked_fill(~entries.visual, torch.inf)


def scorer_named(text: object) -> CacheScorer:
    """Build the method that an option such as ``scorer="snapkv(window=16)"`` names; its ``keep`` is not used.

    Raises:
        ValueError: if it is no method that scores cached entries.

    Example:
        >>> scorer_named("snapkv(window=16)").window
        16
    """
    found = parse_node(parse_text(text), text) if isinstance(text, str) else None
    if not isinstance(found, CacheScorer):
        raise ValueError(
            f"scorer={text!r} must name one method that scores cached entries, such as 'snapkv' or "
            "'expected_attention(future=128)'"
        )
    return found


@dataclass(frozen=True)
class ModelEvictor(Evictor):
    """Decide about all layers together, once the last of them has read the prompt.

    Until then the whole cache is held.
    """

    kind: ClassVar[str] = "ModelEvictor"

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Leave it to the data, which spread the budget over the layers."""
        return None

    @abstractmethod
    def observe(self, entries: Entries) -> Any:
        """Take from one layer what the decision needs."""

    @abstractmethod
    def settle(self, observed: Sequence[Any]) -> list[Retained | None]:
        """Decide for every layer, given what was observed in each, first to last."""

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Decide as if this layer were the only one."""
        found = self.settle([self.observe(entries)])[0]
        return found or Retained(torch.ones_like(entries.visual))


@dataclass(frozen=True)
class Adjuster(CacheMethod):
    """Change what survived an eviction: merge what goes into it, or move it."""

    kind: ClassVar[str] = "Adjuster"
    role: ClassVar[str] = "adjust"
    compacts: ClassVar[bool] = False
    """Whether later tokens have to be numbered on from the entries that are left."""

    @abstractmethod
    def adjust(self, entries: Entries, retained: Retained) -> Retained:
        """Return the same choice with other keys or values."""


@dataclass(frozen=True)
class Forgetter(CacheMethod):
    """Decide at every decode step whether the new token is remembered from some layer on."""

    kind: ClassVar[str] = "Forgetter"
    role: ClassVar[str] = "forget"
    decodes: ClassVar[bool] = True

    @abstractmethod
    def first_layer(self, depth: int) -> int:
        """Return the first layer that forgets, of ``depth``."""

    @abstractmethod
    def remember(self, hidden: Tensor) -> Tensor:
        """Say which new tokens stay, bool ``[B]``, given their states ``[B, D]`` at the input of that layer."""


@dataclass(frozen=True)
class Retriever(CacheMethod):
    """Keep the whole cache, and let every decode step read a part of it.

    Attributes:
        keep: entries of the prompt that a step reads; int = count, float in (0, 1] = fraction, cut off.
        dense_layers: the first layers read everything.
    """

    kind: ClassVar[str] = "Retriever"
    role: ClassVar[str] = "retrieve"
    decodes: ClassVar[bool] = True

    keep: int | float = 0.2
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if isinstance(self.dense_layers, bool) or not isinstance(self.dense_layers, int) or self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers!r} must be an int of at least 0: layers that read all")

    def keep_count(self, entries: int) -> int:
        """Say how many of ``entries`` a step may read."""
        wanted = self.keep if isinstance(self.keep, int) else int(self.keep * entries)
        return min(max(1, wanted), entries)

    def prepare(self, entries: Entries) -> None:
        """Look at the prompt once; what steps need goes into ``entries.memory``."""

    @abstractmethod
    def choose(self, step: Step) -> Tensor | None:
        """Choose what the new token reads.

        Returns:
            bool ``[P]``, ``[G, P]`` or ``[H, P]``; None = everything. The new entry itself is always read.
        """


class Packed(ABC):
    """A block of keys or values in a smaller form."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that is stored; their sizes are what a report counts."""

    @abstractmethod
    def restore(self) -> Tensor:
        """Return the block ``[G, n, d]`` in the dtype it had."""

    def readable(self) -> Codes | None:
        """Return the block, as a batch of one, in the form attention reads without restoring it; None = in none."""
        return None


@dataclass(frozen=True)
class Packer(CacheMethod):
    """Store keys and values in a smaller form.

    Attributes:
        residual: newest entries that stay as they are.
    """

    kind: ClassVar[str] = "Packer"
    role: ClassVar[str] = "pack"

    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.residual, bool) or not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(f"residual={self.residual!r} must be an int of at least 0: entries that stay as they are")

    def due(self, loose: int, side: Literal["key", "value"]) -> int:
        """Say how many of the oldest ``loose`` (unpacked) entries are to be packed now."""
        return max(0, loose - self.residual)

    @abstractmethod
    def pack(self, states: Tensor, side: Literal["key", "value"], entries: Entries | None) -> Packed:
        """Pack a block ``[G, n, d]``.

        Args:
            states: keys or values, oldest first.
            side: which of them.
            entries: the entries of the block where it is (a part of) the prompt; None for generated tokens.
        """


def top_mask(score: Tensor, kept: int) -> Tensor:
    """Mark the ``kept`` highest scores of each row; ties go to the lower index.

    Args:
        score: ``[..., n]``.
        kept: how many.

    Returns:
        bool of the same shape.

    Example:
        >>> top_mask(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]]), 1).tolist()
        [[False, True, False], [True, False, False]]
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)
