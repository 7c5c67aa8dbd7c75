"""The transformers-free half of a cache layer whose stored and logical length differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfast.kv.entries import Retained


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


@dataclass
class PromptBook:
    """What a layer knows of the prompt of one row.

    Attributes:
        entries: entries the layer made of the prompt, evicted ones included.
        end: logical length at the end of the prompt.
        memory: what a method of the cache remembers.
        trail: what it would remember after each token of the last call, where these are drafted.
    """

    entries: int
    end: int
    memory: dict[str, Tensor] = field(default_factory=dict)
    trail: list[dict[str, Tensor]] = field(default_factory=list)

    def copy(self) -> PromptBook:
        """Copy the book for another beam."""
        return PromptBook(self.entries, self.end, dict(self.memory))


BOOKS = (
    "seen",
    "valid",
    "slots",
    "sizes",
    "visual",
    "shift",
    "renumbered",
    "history",
    "heads",
    "places",
    "bias",
    "floor",
    "holes",
)
"""What a layer knows beside keys and values; tensors are replaced and never written to."""

_ROW_BOOKS = ("valid", "slots", "sizes", "visual", "shift", "heads", "places", "bias")
"""Books whose first axis are the rows of the batch."""


class LogicalLength:
    """Mixin of a cache layer: the outside sees ``seen`` logical tokens, the inside stores fewer.

    The concrete class provides ``keys`` and ``values`` of ``[B, G, P, d]``.

    Attributes:
        seen: logical tokens so far, dropped ones included; what ``get_seq_length`` reports.
        valid: ``[B, P]`` bool, which stored slots are real tokens; None = all.
        slots: ``[B, P]`` int64, logical place of each stored token.
        sizes: ``[B, P]`` float32, how many tokens each stored one stands for; None = one each.
        visual: ``[B]`` bool, which prompts had images or videos; None = not known to have any.
        shift: ``[B]`` int64, by how much positions of later tokens are lowered (compact positions).
        renumbered: tells layers apart whose shifts differ; layers of the same number count alike.
        heads: ``[B, G, P]`` bool, which stored entries are real in each head, where heads differ; None = see
            ``valid``.
        places: ``[B, G, P]`` int32, logical place of each entry, where heads differ; None = see ``slots``.
        bias: ``[B, G, P]`` float32, added to the logits of each entry; None = nothing.
        floor: logical length of the last prompt of which entries were evicted or packed; what is below it
            cannot be taken back.
        holes: whether tokens after the prompt have been forgotten one by one.
        prompts: per row, the book of its last prompt; None where no method acted on it.
        peers: all layers of the cache.
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
    heads: Tensor | None
    places: Tensor | None
    bias: Tensor | None
    floor: int
    holes: bool
    prompts: list[PromptBook | None] | None
    peers: Sequence[LogicalLength]
    announced: Announcement | None
    keys: Tensor | None
    values: Tensor | None

    def start_logical(self) -> None:
        """Begin with nothing seen."""
        if not hasattr(self, "peers"):
            self.peers = ()
        self.seen = 0
        self.valid = None
        self.slots = None
        self.sizes = None
        self.visual = None
        self.shift = None
        self.renumbered = 0
        self.history = 0
        self.heads = None
        self.places = None
        self.bias = None
        self.floor = 0
        self.holes = False
        self.prompts = None
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
        self._account_heads(query)
        self.seen += note.length
        self.history = hash((self.history, note.level))

    def _account_heads(self, query: int) -> None:
        """Book new entries in the books of the heads: all heads get the same."""
        if self.slots is None:
            return
        for name in ("heads", "places", "bias"):
            book = getattr(self, name)
            if book is None:
                continue
            heads = book.shape[1]
            if name == "bias":
                new = book.new_zeros(*book.shape[:2], query)
            elif name == "places":
                new = self.slots[:, None, -query:].expand(-1, heads, -1).to(book.dtype)
            elif self.valid is None:
                new = torch.ones_like(book[..., :1]).expand(-1, -1, query)
            else:
                new = self.valid[:, None, -query:].expand(-1, heads, -1)
            setattr(self, name, torch.cat([book, new], dim=-1))

    def mask_sizes(self, query: int) -> tuple[int, int]:
        """Say length and offset of the keys: stored tokens are right-aligned on the logical axis."""
        return self.stored + query, self.seen - self.stored

    def check_drop(self, tokens: int) -> None:
        """Refuse to undo the last ``tokens`` tokens where that reaches into tokens that were pruned.

        Raises:
            ValueError: saying so.
        """
        slots = self.slots
        told = slots is not None and (
            self.holes or (self.stored >= tokens and bool((slots[:, -tokens] == self.seen - tokens).all()))
        )
        if not told or self.seen - tokens < self.floor:
            raise ValueError(
                f"cannot take back {tokens} tokens: the cache holds a pruned prompt, and only tokens after its last "
                "dropped token can be taken back; start from a fresh cache instead"
            )

    def drop_last(self, tokens: int) -> None:
        """Undo the last ``tokens`` tokens in all books, keys and values.

        Raises:
            ValueError: if this layer or one of its peers cannot; nothing has changed then.
        """
        if tokens == 0:
            return
        for layer in self.peers or [self]:
            # Layers are cropped one after another: those that were have counted down already.
            if layer.seen == self.seen:
                layer.check_drop(tokens)
        if self.holes and self.slots is not None:
            stays = (self.slots < self.seen - tokens)[:, None, :]
            self.compact(self.real_entries() & stays)
        else:
            for name in ("slots", "valid", "sizes", "heads", "places", "bias"):
                book = getattr(self, name)
                if book is not None:
                    setattr(self, name, book[..., :-tokens])
            self.forget_states(tokens)
        self.seen -= tokens

    def keep_block(self, query: int, places: Tensor, real: Tensor | None) -> None:
        """Keep some of the last ``query`` tokens and forget the others, logically too.

        Args:
            query: tokens the last call brought.
            places: ``[B, W]`` int64, ascending, which of them stay.
            real: ``[B, W]`` bool, which of these are tokens at all, for rows that keep fewer; None = all.
        """
        kept = places.shape[1]
        if self.slots is None or (kept == query and real is None):
            return
        past = self.stored - query
        self.keep_states(query, places, real)
        for name in ("slots", "valid", "sizes", "heads", "places", "bias"):
            book = getattr(self, name)
            if book is None:
                continue
            own = places.to(book.device)
            own = own if book.ndim == 2 else own[:, None].expand(-1, book.shape[1], -1)
            setattr(self, name, torch.cat([book[..., :past], book[..., past:].gather(-1, own)], dim=-1))
        if real is not None:
            real = real.to(self.slots.device)
            if self.valid is None:
                self.valid = torch.ones_like(self.slots, dtype=torch.bool)
            self.valid[:, past:] &= real
            if self.heads is not None:
                self.heads[..., past:] &= real[:, None]
            self.history = hash((self.history, -4))
        self.seen -= query - kept

    def keep_states(self, query: int, places: Tensor, real: Tensor | None) -> None:
        """Move keys and values of the last tokens; the books still say how they stood."""
        if self.keys is None or self.values is None:
            return
        past, kept = self.stored - query, places.shape[1]
        if bool((places == torch.arange(kept, device=places.device)).all()):
            if kept < query:
                self.forget_states(query - kept)
            return
        wanted = places.to(self.keys.device)[:, None, :, None]
        for name in ("keys", "values"):
            states = getattr(self, name)
            own = states[:, :, past:].gather(2, wanted.expand(-1, states.shape[1], -1, states.shape[-1]))
            setattr(self, name, torch.cat([states[:, :, :past], own], dim=2))

    def room(self) -> int | None:
        """Say how many tokens one call may bring without a difference to as many calls; None for any number."""
        return None

    def forget_states(self, tokens: int) -> None:
        """Cut the last ``tokens`` keys and values off."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys[..., :-tokens, :]
            self.values = self.values[..., :-tokens, :]

    def select_rows(self, rows: Tensor) -> None:
        """Reorder or choose rows of the batch in every book."""
        for name in _ROW_BOOKS:
            book = getattr(self, name)
            if book is not None:
                setattr(self, name, book.index_select(0, rows.to(book.device)))
        if self.prompts is not None:
            chosen = [self.prompts[row] for row in rows.tolist()]
            self.prompts = [None if book is None else book.copy() for book in chosen]

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row of the batch in every book."""
        for name in _ROW_BOOKS:
            book = getattr(self, name)
            if book is not None:
                setattr(self, name, book.repeat_interleave(repeats, dim=0))
        if self.prompts is not None:
            self.prompts = [None if book is None else book.copy() for book in self.prompts for _ in range(repeats)]

    def storage(self) -> list[Tensor]:
        """Return every tensor that holds keys, values or what is known of single entries of a head."""
        held = [self.keys, self.values, self.heads, self.places, self.bias]
        for book in self.prompts or []:
            held += [] if book is None else list(book.memory.values())
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    def real_entries(self) -> Tensor:
        """Say which stored entries are real, bool ``[B, G, P]``."""
        if self.keys is None:
            raise RuntimeError("nothing has been stored yet")
        batch, heads, stored = self.keys.shape[:3]
        if self.heads is not None:
            return self.heads
        if self.valid is None:
            return torch.ones(batch, 1, stored, dtype=torch.bool, device=self.keys.device).expand(-1, heads, -1)
        return self.valid[:, None, :].expand(-1, heads, -1)

    def retain(self, choices: Sequence[tuple[Tensor, Retained] | None]) -> None:
        """Keep what was chosen of each row's prompt; everything else that is stored stays too.

        Args:
            choices: per row, the ``[n]`` int64 places of the entries that were up for choice among those stored
                (``[G, n]`` where heads differ), and the choice; None = all stay.
        """
        if self.keys is None or self.values is None or all(choice is None for choice in choices):
            return
        keep = self.real_entries().clone()
        changed: dict[str, Tensor] = {}
        for row, choice in enumerate(choices):
            if choice is None:
                continue
            places, retained = choice
            places = places.to(keep.device).expand(keep.shape[1], -1)
            stays = keep[row].gather(1, places) & retained.by_head(keep.shape[1]).to(keep.device)
            keep[row].scatter_(1, places, stays)
            for name, states in (("keys", retained.keys), ("values", retained.values)):
                if states is not None:
                    whole = changed.setdefault(name, getattr(self, name).clone())
                    whole[row].scatter_(1, places[..., None].expand_as(states), states.to(whole.dtype))
            if retained.bias is not None:
                start = self.bias if self.bias is not None else torch.zeros(keep.shape, device=keep.device)
                changed.setdefault("bias", start.clone())[row].scatter_(1, places, retained.bias.float())
        for name, whole in changed.items():
            setattr(self, name, whole)
        self.compact(keep)

    def compact(self, keep: Tensor) -> None:
        """Keep some stored entries, head by head, and forget the others; the logical length stays.

        Args:
            keep: bool ``[B, G, P]``; entries that are not real must be out.
        """
        if self.keys is None or self.values is None or self.slots is None:
            return
        heads, stored = keep.shape[1:]
        counts = keep.sum(dim=-1)
        longest = int(counts.max())
        alike = bool((keep == keep[:, :1]).all())
        # What stays moves to the right, in order; rows and heads with less are filled up on the left.
        order = keep.to(torch.int8).sort(dim=-1, stable=True).indices[..., stored - longest :]
        real = keep.gather(-1, order)
        some = real.any(dim=1)
        self.gather_states(order, some)
        if not alike or self.places is not None:
            places = self.slots[:, None].expand(-1, heads, -1).to(torch.int32) if self.places is None else self.places
            self.places = places.gather(-1, order)
        self.bias = None if self.bias is None else self.bias.gather(-1, order)
        ragged = not bool((counts == counts[:, :1]).all())
        self.heads = real if ragged else None
        self.valid = None if bool(some.all()) else some
        # Where heads differ the first that has an entry stands for all: its own places are in ``places``.
        first = order.gather(1, real.to(torch.int8).argmax(dim=1, keepdim=True))[:, 0]
        self.slots = self.slots.gather(1, first)
        self.sizes = None if self.sizes is None else self.sizes.gather(1, first)
        own = hash(tuple(counts.flatten().tolist())) if self.valid is not None or ragged else longest
        self.history = hash((self.history, own, -3))

    def gather_states(self, order: Tensor, real: Tensor) -> None:
        """Move keys and values to where they stand from now on; the books still say how they stood.

        Args:
            order: ``[B, G, K]`` int64, where each comes from.
            real: ``[B, K]`` bool, which of them exist in any head.
        """
        for name in ("keys", "values"):
            states = getattr(self, name)
            setattr(self, name, states.gather(2, order[..., None].expand(-1, -1, -1, states.shape[-1])))

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
