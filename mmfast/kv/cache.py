"""The transformers-free half of a cache layer whose stored and logical length differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Announcement:
    """What the next ``update`` of a layer brings.

    Attributes:
        length: number of logical tokens, dropped ones included.
        valid: ``[B, q]`` bool, which of the q stored tokens are real; None = all.
        slots: ``[B, q]`` int64, the logical place of each stored token, counted from the start of the call.
        level: number that tells apart the different selections of tokens inside one call.
        sizes: ``[B, q]`` float32, how many tokens each stored one stands for; None = one each.
    """

    length: int
    valid: Tensor | None
    slots: Tensor
    level: int = 0
    sizes: Tensor | None = None


class LogicalLength:
    """Mixin of a cache layer: the outside sees ``seen`` logical tokens, the inside stores fewer.

    The concrete class provides ``keys`` and ``values`` of ``[B, H, P, d]``.

    Attributes:
        seen: logical tokens so far, dropped ones included; what ``get_seq_length`` reports.
        valid: ``[B, P]`` bool, which stored slots are real tokens; None = all.
        slots: ``[B, P]`` int64, logical place of each stored token.
        sizes: ``[B, P]`` float32, how many tokens each stored one stands for; None = one each.
        visual: ``[B]`` bool, which prompts had images or videos; None = not known to have any.
        shift: ``[B]`` int64, by how much positions of later tokens are lowered (compact positions).
        renumbered: how many of the shifts this layer does not share with the first one.
        history: layers of one cache with the same history have the same books.
    """

    seen: int
    valid: Tensor | None
    slots: Tensor | None
    sizes: Tensor | None
    visual: Tensor | None
    shift: Tensor | None
    renumbered: int
    history: int
    announced: Announcement | None
    keys: Tensor | None
    values: Tensor | None

    def start_logical(self) -> None:
        """Begin with nothing seen."""
        self.seen = 0
        self.valid = None
        self.slots = None
        self.sizes = None
        self.visual = None
        self.shift = None
        self.renumbered = 0
        self.history = 0
        self.announced = None

    @property
    def stored(self) -> int:
        """Number of stored slots P."""
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def account(self, batch: int, query: int, device: torch.device) -> None:
        """Book the ``query`` tokens that are about to be stored.

        Raises:
            ValueError: if nobody announced them, though masks and positions have to follow what was dropped.
        """
        note, self.announced = self.announced, None
        if note is None:
            if self.seen != self.stored or self.valid is not None or self.shift is not None:
                raise ValueError(
                    "this cache holds a pruned prompt and can only be continued while a plan is at work on the model; "
                    "call accelerate() again, or start from a fresh cache"
                )
            note = Announcement(query, None, torch.arange(query, device=device).expand(batch, query))
        fresh = note.slots.to(device) + self.seen
        self.slots = fresh if self.slots is None else torch.cat([self.slots, fresh], dim=1)
        if self.valid is not None or note.valid is not None:
            past = self.slots.shape[1] - query
            before = self.valid if self.valid is not None else torch.ones(batch, past, dtype=torch.bool, device=device)
            new = (
                note.valid.to(device)
                if note.valid is not None
                else torch.ones(batch, query, dtype=torch.bool, device=device)
            )
            self.valid = torch.cat([before, new], dim=1)
        if self.sizes is not None or note.sizes is not None:
            ones = torch.ones(batch, self.slots.shape[1], device=device)
            past = self.slots.shape[1] - query
            sizes = ones[:, :past] if self.sizes is None else self.sizes
            self.sizes = torch.cat([sizes, ones[:, past:] if note.sizes is None else note.sizes.to(device)], dim=1)
        self.seen += note.length
        self.history = hash((self.history, note.level))

    def mask_sizes(self, query: int) -> tuple[int, int]:
        """Say length and offset of the keys: stored tokens are right-aligned on the logical axis."""
        return self.stored + query, self.seen - self.stored

    def drop_last(self, tokens: int) -> None:
        """Undo the last ``tokens`` tokens.

        Raises:
            ValueError: if that would reach into tokens that were pruned.
        """
        if tokens == 0:
            return
        slots = self.slots
        if slots is None or self.stored < tokens or not bool((slots[:, -tokens] == self.seen - tokens).all()):
            raise ValueError(
                f"cannot take back {tokens} tokens: the cache holds a pruned prompt, and only tokens after its last "
                "dropped token can be taken back; start from a fresh cache instead"
            )
        self.slots = slots[:, :-tokens]
        if self.valid is not None:
            self.valid = self.valid[:, :-tokens]
        if self.sizes is not None:
            self.sizes = self.sizes[:, :-tokens]
        self.seen -= tokens

    def select_rows(self, rows: Tensor) -> None:
        """Reorder or choose rows of the batch in every book."""
        for name in ("valid", "slots", "sizes", "visual", "shift"):
            book = getattr(self, name)
            if book is not None:
                setattr(self, name, book.index_select(0, rows.to(book.device)))

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row of the batch in every book."""
        for name in ("valid", "slots", "sizes", "visual", "shift"):
            book = getattr(self, name)
            if book is not None:
                setattr(self, name, book.repeat_interleave(repeats, dim=0))

    def narrow(self, places: Tensor, real: Tensor | None) -> None:
        """Keep some stored tokens and forget the others; the logical length stays.

        Args:
            places: ``[B, K]`` int64, ascending places among the stored tokens.
            real: ``[B, K]`` bool, which of them are real; None = as they were.
        """
        if self.keys is None or self.values is None or self.slots is None:
            return
        places = places.to(self.keys.device)
        wanted = places[:, None, :, None]
        for name in ("keys", "values"):
            states = getattr(self, name)
            setattr(self, name, states.gather(2, wanted.expand(-1, states.shape[1], -1, states.shape[3])))
        self.slots = self.slots.gather(1, places)
        self.sizes = None if self.sizes is None else self.sizes.gather(1, places)
        valid = None if self.valid is None else self.valid.gather(1, places)
        if real is not None:
            real = real.to(places.device)
            valid = real if valid is None else valid & real
        self.valid = valid
        self.history = hash((self.history, int(places.shape[1]), -1))
