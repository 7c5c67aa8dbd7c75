"""Entries of a cache out of arrays, for golden vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmfast.kv.entries import Entries, Rotation, rotate

Case = dict[str, np.ndarray]


def tensor(case: Case, name: str) -> Tensor:
    """Return an array as a tensor; floats as float32."""
    found = torch.from_numpy(np.asarray(case[name]))
    return found.float() if found.is_floating_point() else found


def rotary(length: int, width: int, theta: float) -> Rotation:
    """Make the position embedding of places 0, 1, ... as Llama does."""
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)

    def at(places: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.cat([places.double()[:, None] * frequencies] * 2, dim=-1)
        return angles.cos().float(), angles.sin().float()

    return Rotation(*at(torch.arange(length)), at)


def rows(case: Case, visual: Tensor | None = None, layer: int = 0, depth: int = 1) -> Iterator[tuple[int, Entries]]:
    """Go through the batch of a case: ``key``, and where there are ``value`` and ``query`` (or un-rotated ones)."""
    keys = tensor(case, "key")
    values = tensor(case, "value") if "value" in case else torch.zeros_like(keys)
    rotation = None
    if "rope_theta" in case:
        rotation = rotary(keys.shape[-2], keys.shape[-1], float(case["rope_theta"]))
    query = tensor(case, "query") if "query" in case else None
    if "query_pre_rope" in case and rotation is not None:
        query = rotate(tensor(case, "query_pre_rope"), rotation.cos, rotation.sin)
    weight = tensor(case, "o_proj_weight") if "o_proj_weight" in case else None
    for row in range(keys.shape[0]):
        own = None if query is None else query[row]
        yield (
            row,
            Entries.of(
                keys[row],
                values[row],
                own,
                visual,
                rotation=rotation,
                output_weight=weight,
                layer=layer,
                depth=depth,
            ),
        )


def indices(mask: Tensor) -> np.ndarray:
    """Write a bool ``[G, n]`` mask with equal counts per row as ascending indices ``[G, k]``."""
    return np.stack([row.nonzero().squeeze(-1).numpy() for row in mask])


def kept_of(case: Case) -> int:
    """Say how many entries stay: ``keep``, or what ``drop_ratio`` leaves."""
    if "keep" in case:
        return int(case["keep"])
    return int(case["key"].shape[-2] * (1 - float(case["drop_ratio"])))
