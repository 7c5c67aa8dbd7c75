"""What methods of the cache see of ONE prompt in ONE layer, and what they decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.rerotate.reference import rotate as rotate
from mmfast.kernels.rerotate.reference import undo
from mmfast.token_pruning.attention import AttentionView


@dataclass(frozen=True)
class Rotation:
    """The rotary position embedding of some tokens.

    Attributes:
        cos: ``[n, r]`` cosines by which queries and keys were rotated; r may be less than the head size.
        sin: ``[n, r]`` sines.
        at: gives cosines and sines ``[m, r]`` for int64 places ``[m]`` of a text, counted from the first entry;
            places from n on continue after the last position there is.
    """

    cos: Tensor
    sin: Tensor
    at: Callable[[Tensor], tuple[Tensor, Tensor]]

    def undo(self, states: Tensor) -> Tensor:
        """Turn rotated states ``[..., n, d]`` back, in float32.

        Example:
            >>> angle = torch.tensor([[0.3, 0.3]])
            >>> rotation = Rotation(angle.cos(), angle.sin(), lambda places: (places, places))
            >>> states = torch.tensor([[1.0, 2.0]])
            >>> bool(rotation.undo(rotate(states, rotation.cos, rotation.sin)).allclose(states))
            True
        """
        return undo(states, self.cos, self.sin)


@dataclass(frozen=True)
class Entries:
    """What ONE layer has cached of ONE prompt, right after its attention.

    G is the number of key/value heads, H of query heads; query head h reads key/value head ``h // (H / G)``.

    Attributes:
        keys: ``[G, n, d]``, rotated.
        values: ``[G, n, d]``.
        visual: ``[n]`` bool, which entries are visual tokens.
        media: ``[n]`` int64, which image or video of the prompt each belongs to; -1 for text.
        frame: ``[n]`` int64, frame inside its video (0 for images); -1 for text.
        layer: index of the layer.
        depth: number of layers.
        attention: queries and keys of the prompt, if ``"attention"`` is in ``needs``.
        rotation: the position embedding, if ``"rotation"`` is in ``needs``.
        output_weight: ``[D, H * d]`` weight of the output projection, if ``"output_projection"`` is in ``needs``.
        memory: what the method wants to remember of this prompt in this layer for later steps; it may
            write here and nowhere else. Tensors only.
    """

    keys: Tensor
    values: Tensor
    visual: Tensor
    media: Tensor
    frame: Tensor
    layer: int = 0
    depth: int = 1
    attention: AttentionView | None = None
    rotation: Rotation | None = None
    output_weight: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        keys: Tensor,
        values: Tensor,
        query: Tensor | None = None,
        visual: Tensor | None = None,
        **others: Any,
    ) -> Entries:
        """Wrap bare tensors; without ``visual`` all entries are text.

        Args:
            keys: ``[G, n, d]``.
            values: ``[G, n, d]``.
            query: ``[H, n, d]``.
            visual: ``[n]`` bool; all of them belong to one image.
            others: further attributes.

        Example:
            >>> len(Entries.of(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)))
            5
        """
        if visual is None:
            visual = torch.zeros(keys.shape[1], dtype=torch.bool, device=keys.device)
        media = visual.long() - 1
        view = None if query is None else AttentionView(query, keys, values)
        return Entries(keys, values, visual, **{"media": media, "frame": media, "attention": view, **others})

    def __len__(self) -> int:
        return int(self.keys.shape[1])

    @property
    def heads(self) -> int:
        """Number G of key/value heads."""
        return int(self.keys.shape[0])

    @property
    def view(self) -> AttentionView:
        """The attention of the prompt.

        Raises:
            RuntimeError: if the method did not ask for it.
        """
        if self.attention is None:
            raise RuntimeError('a method that reads attention must name "attention" in needs')
        return self.attention

    @cached_property
    def after_media(self) -> int:
        """Number of entries after the last visual one; all of them where there is none."""
        last = self.visual.nonzero()
        return len(self) - 1 - int(last[-1]) if last.numel() else len(self)

    def last_rows(self, rows: int) -> Tensor:
        """Attention of the last ``rows`` tokens to all entries, post-softmax.

        Returns:
            float32 ``[H, rows, n]``; fewer rows where the prompt is shorter.

        Example:
            >>> zeros = torch.zeros(1, 3, 2)
            >>> Entries.of(zeros, zeros, zeros).last_rows(1)[0, 0].tolist() == [1 / 3] * 3
            False
            >>> Entries.of(zeros, zeros, zeros).last_rows(2).shape
            torch.Size([1, 2, 3])
        """
        first = max(0, len(self) - rows)
        return self.view.rows(torch.arange(first, len(self), device=self.keys.device))

    def per_group(self, scores: Tensor, reduce: Literal["mean", "max", "sum"] = "mean") -> Tensor:
        """Reduce ``[H, ...]`` over the query heads that share a key/value head, to ``[G, ...]``.

        Example:
            >>> two = torch.zeros(1, 3, 2)
            >>> Entries.of(two, two).per_group(torch.tensor([[1.0], [3.0]])).tolist()
            [[2.0]]
        """
        grouped = rearrange(scores, "(g r) ... -> g r ...", g=self.heads)
        if reduce == "max":
            return grouped.amax(dim=1)
        return grouped.mean(dim=1) if reduce == "mean" else grouped.sum(dim=1)

    def take(self, places: Tensor) -> Entries:
        """Narrow to some entries; attention and rotation are left out.

        Example:
            >>> zeros = torch.zeros(1, 3, 2)
            >>> len(Entries.of(zeros, zeros).take(torch.tensor([0, 2])))
            2
        """
        return Entries(
            self.keys[:, places],
            self.values[:, places],
            self.visual[places],
            self.media[places],
            self.frame[places],
            self.layer,
            self.depth,
            output_weight=self.output_weight,
            memory=self.memory,
        )


@dataclass(frozen=True)
class Retained:
    """What stays of the entries of one prompt in one layer.

    Attributes:
        kept: bool ``[n]``, or ``[G, n]`` where heads differ.
        keys: ``[G, n, d]`` keys of the entries that stay, where they change; rows that go are not looked at.
        values: the same for values.
        bias: float32 ``[G, n]``, added to the logits of an entry from now on; for entries that stand for many.
    """

    kept: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Entries left per head; one number where all heads keep the same."""
        return [int(row.sum()) for row in (self.kept if self.kept.ndim == 2 else self.kept[None])]

    def by_head(self, heads: int) -> Tensor:
        """Return ``kept`` as bool ``[G, n]``."""
        return self.kept if self.kept.ndim == 2 else self.kept.expand(heads, -1)


@dataclass(frozen=True)
class Step:
    """One decode step of ONE prompt in ONE layer: its new entry is stored already, as the last.

    Attributes:
        keys: ``[G, P, d]`` everything stored, rotated.
        values: ``[G, P, d]``.
        query: ``[H, 1, d]`` of the new token.
        seen: tokens of this prompt so far, evicted and new ones included.
        added: how many entries have been stored since the prompt.
        layer: index of the layer.
        depth: number of layers.
        real: bool ``[G, P]``, entries that exist in each head; None = all.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.
        memory: what the method remembers of this prompt in this layer.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    seen: int
    added: int = 1
    layer: int = 0
    depth: int = 1
    real: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.keys.shape[1])

    @property
    def heads(self) -> int:
        """Number G of key/value heads."""
        return int(self.keys.shape[0])

    def logits(self) -> Tensor:
        """Return the scaled logits of the new token, float32 ``[H, P]``; minus infinity where nothing is.

        Example:
            >>> step = Step(torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(2, 1, 4), seen=3)
            >>> step.logits().tolist()
            [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
        """
        view = AttentionView(self.query, self.keys, scaling=self.scaling, softcap=self.softcap)
        logits = view.logits(torch.zeros(1, dtype=torch.int64, device=self.keys.device), masked=False)[:, 0]
        if self.real is None:
            return logits
        return logits.masked_fill(~self.real.repeat_interleave(logits.shape[0] // self.heads, dim=0), -torch.inf)

    def probabilities(self) -> Tensor:
        """Return the attention of the new token, float32 ``[H, P]``."""
        return self.logits().softmax(dim=-1)
