"""The greedy step that kernels share: each program offers the best of its rows, and the best of all is the pick."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WIDE = 32, 64
"""Rows of one program, and how much of their width it reads at once."""


@triton.jit
def best_row(score, row, beyond):
    """The highest score and the lowest of the rows that reach it; a row below ``beyond`` whatever the scores are."""
    top = tl.max(score, axis=0)
    return top, tl.min(tl.where(score == top, row, beyond - 1), axis=0)


@triton.jit
def best_offer(offers, places, start, blocks, beyond, PARTS: tl.constexpr):
    """The best of what the programs of a step offered: score and row."""
    part = tl.arange(0, PARTS)
    offer = tl.load(offers + start + part, mask=part < blocks, other=-float("inf"))
    place = tl.load(places + start + part, mask=part < blocks, other=beyond)
    return best_row(offer, place, beyond)


@triton.jit
def cosines(unit, first, row, inside, pick, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The products of rows ``[BLOCK]`` with the row ``pick``, all of them counted from the row ``first`` on."""
    found = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
    for start in range(0, width, WIDE):
        column = start + tl.arange(0, WIDE)
        picked = tl.load(unit + (first + pick) * width + column, mask=column < width, other=0.0)
        own = unit + (first + row)[:, None] * width + column[None, :]
        seen = inside[:, None] & (column < width)[None, :]
        found += tl.load(own, mask=seen, other=0.0) * picked[None, :]
    return tl.sum(found, axis=1)


class Offers:
    """What the programs of one step offer to the next; two buffers, so that no step reads what it writes.

    Args:
        like: tensor on the device of the kernels.
        batch: images.
        total: rows of each.
    """

    def __init__(self, like: Tensor, batch: int, total: int) -> None:
        self.blocks = triton.cdiv(total, BLOCK)
        self.parts = triton.next_power_of_2(self.blocks)
        self.score = torch.zeros(2, batch, self.blocks, device=like.device)
        self.place = torch.full((2, batch, self.blocks), -1, dtype=torch.int32, device=like.device)

    def seed(self, first: Tensor) -> None:
        """Let step 1 find ``first``, int64 ``[B]``, as what step 0 picked."""
        self.score[0].fill_(-torch.inf)[:, 0] = 0.0
        self.place[0, :, 0] = first.to(torch.int32)

    def pick(self, step: int) -> Tensor:
        """Return int64 ``[B]``, what was picked in a step."""
        score, place = self.score[step % 2], self.place[step % 2]
        # Places ascend with the blocks, so the first of equal offers is the lowest row.
        return place.gather(1, score.argmax(dim=1, keepdim=True))[:, 0].long()


def without_spent(picks: Tensor, counts: Tensor) -> Tensor:
    """Overwrite with -1 what was picked when nothing was left.

    Args:
        picks: int64 ``[B, K]``.
        counts: ``[B]``, how many rows there were to pick.
    """
    step = torch.arange(picks.shape[1], device=picks.device)
    return picks.masked_fill_(step >= counts[:, None], -1)
