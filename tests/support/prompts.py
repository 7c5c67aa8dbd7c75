"""Prompts written by hand: no tokenizer, no processor, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfast.tokens import Layout

PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, BEGIN, END, BREAK, TAG, VOCO = 120, 121, 122, 123, 124, 125, 126
VOCABULARY = 128
TEXT = range(10, 110)
"""Ids of text tokens; everything from ``IMAGE`` on is special."""


@dataclass(frozen=True, eq=False)
class Media:
    """One image or video with the tokens that stand for it.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        ids: its tokens in the prompt, wrapping included.
        layouts: where its visual tokens lie, worked out by hand; one per item the model encodes.
        tensors: what it adds to the model's inputs.
    """

    modality: str
    ids: tuple[int, ...]
    layouts: tuple[Layout, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)


Piece = Media | int | tuple[int, ...]
"""A piece of a prompt: an image or video, a number of text tokens to draw, or the tokens themselves."""


def text(count: int, seed: int) -> list[int]:
    """Draw ``count`` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT.start, TEXT.stop, (count,), generator=generator).tolist()


def tokens(row: Sequence[Piece], seed: int = 0) -> list[int]:
    """Write one prompt down."""
    ids: list[int] = []
    for place, piece in enumerate(row):
        ids.extend(ids_of(piece, 100 * seed + place))
    return ids


def ids_of(piece: Piece, seed: int = 0) -> Sequence[int]:
    """Return the tokens of one piece."""
    if isinstance(piece, int):
        return text(piece, seed)
    return piece.ids if isinstance(piece, Media) else piece


def left_padded(rows: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """Stack rows of different length, padded on the left."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def padded(inputs: dict[str, Tensor], side: str = "left", count: int = 2) -> dict[str, Tensor]:
    """Pad the prompts of inputs, as a processor does that was told a length."""
    room = (count, 0) if side == "left" else (0, count)
    length = inputs["input_ids"].shape[1]
    return {
        name: torch.nn.functional.pad(value, room) if value.shape[1:] == (length,) else value
        for name, value in inputs.items()
    }


def noise(*shape: int, seed: int) -> Tensor:
    """Draw pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))
