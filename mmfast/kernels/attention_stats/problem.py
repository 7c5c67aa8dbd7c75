"""The arguments that all slices of attention share, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from mmfast.kernels.checks import check_bool, check_heads, check_shape, check_whole


class Options(TypedDict, total=False):
    """How logits come about and what a row sees, the same for all slices.

    A logit is ``(softcap(q . k * scaling) + mask) / temperature``.

    Attributes:
        scaling: factor of the products, ``d ** -0.5`` when None or left out.
        softcap: cap of the logits, ``softcap * tanh(x / softcap)``; None = none.
        temperature: divides the logits; 1.
        causal: rows see no column after their own; True.
        window: rows see their own column and the ``window - 1`` before it; None = all.
        places: ``[R]`` or ``[B, R]`` int64, the column each row stands in, for ``causal`` and ``window``; None = the
            last R columns, in order.
        valid: ``[B, m]`` bool, columns that exist: the way to padded batches of prompts of several lengths. It says
            nothing about rows; what padded rows give is left out by their weights. None = all.
        packed: ``[S + 1]`` int32 or int64, where S prompts that lie one after the other in the columns begin, and
            where the last of them ends: ``[0, ..., m]``, ascending. A row sees the prompt it stands in alone, and tiles
            of others are passed over: the way to prompts of several lengths without padding. None = one prompt.
        mask: ``[B or 1, H or 1, R, m]`` bool (True = visible) or additive, on top of the others; an additive value
            below half of the lowest float32 hides, as minus infinity does. None = none.
    """

    scaling: float | None
    softcap: float | None
    temperature: float
    causal: bool
    window: int | None
    places: Tensor | None
    valid: Tensor | None
    packed: Tensor | None
    mask: Tensor | None


HIDES = torch.finfo(torch.float32).min / 2
"""Additive values at or below this hide a column."""


@dataclass(frozen=True)
class Problem:
    """Checked arguments.

    Attributes:
        query: ``[B, H, R, d]``.
        key: ``[B, G, m, d]``; G divides H.
        scaling: factor of the products.
        softcap: cap of the logits, if any.
        temperature: divides the logits.
        causal: whether rows see no column after their own.
        window: how many columns a row sees at most, if limited.
        places: ``[B, R]`` int64, if rows do not stand in the last columns.
        valid: ``[B, m]`` bool, if some columns do not exist.
        begins: ``[B, R]`` int64, the first column of the prompt a row stands in, if several are packed.
        ends: ``[B, R]`` int64, the column behind that prompt.
        mask: ``[B or 1, H or 1, R or 1, m or 1]`` bool or additive.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    temperature: float
    causal: bool
    window: int | None
    places: Tensor | None = None
    valid: Tensor | None = None
    begins: Tensor | None = None
    ends: Tensor | None = None
    mask: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, R and m."""
        batch, heads, rows, _ = self.query.shape
        return int(batch), int(heads), int(rows), int(self.key.shape[2])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors there are, or are not, in the order of :meth:`holding`."""
        return self.query, self.key, self.places, self.valid, self.begins, self.ends, self.mask

    @property
    def numbers(self) -> tuple[float, float | None, float, bool, int | None]:
        """All that is no tensor, in the order of :meth:`holding`."""
        return self.scaling, self.softcap, self.temperature, self.causal, self.window

    @classmethod
    def holding(cls, tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]) -> Problem:
        """Put together again what :attr:`tensors` and :attr:`numbers` took apart."""
        query, key, *others = tensors
        return cls(cast("Tensor", query), cast("Tensor", key), *numbers, *others)

    @property
    def whole_mask(self) -> Tensor | None:
        """The mask as ``[B, H, R, m]``, expanded."""
        return None if self.mask is None else self.mask.expand(self.sizes)

    def stood_in(self) -> Tensor:
        """Return the column each row stands in, ``[B, R]`` int64."""
        batch, _, rows, columns = self.sizes
        if self.places is not None:
            return self.places
        return torch.arange(columns - rows, columns, device=self.query.device).expand(batch, rows)

    def part(self, rows: slice) -> Problem:
        """Return the problem of some of the rows."""
        mask = self.mask
        return replace(
            self,
            query=self.query[:, :, rows],
            places=self.stood_in()[:, rows],
            begins=None if self.begins is None else self.begins[:, rows],
            ends=None if self.ends is None else self.ends[:, rows],
            mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows],
        )


def problem_of(query: Tensor, key: Tensor, options: Options) -> Problem:
    """Check arguments and fill in what was left out.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
        TypeError: if a dtype does not fit.
    """
    check_shape("query", query, "B H R d")
    batch, heads, rows, width = query.shape
    check_shape("key", key, "B G m d", B=batch, d=width)
    groups, columns = key.shape[1:3]
    check_heads("key", groups, 1, heads)
    if not query.is_floating_point() or query.dtype != key.dtype:
        raise TypeError(
            f"query ({query.dtype}) and key ({key.dtype}) must have one floating dtype; convert one of them"
        )
    scaling, softcap, window = options.get("scaling"), options.get("softcap"), options.get("window")
    temperature = options.get("temperature", 1.0)
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be a positive number")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1; leave it out for no limit")
    places, valid, packed, mask = options.get("places"), options.get("valid"), options.get("packed"), None
    if places is not None:
        if places.dtype != torch.int64:
            raise TypeError(f"places must be int64, not {places.dtype}")
        places = _expanded("places", places, (batch, rows))
    if valid is not None:
        check_bool("valid", valid)
        valid = _expanded("valid", valid, (batch, columns))
    if (given := options.get("mask")) is not None:
        if given.dtype != torch.bool and not given.is_floating_point():
            raise TypeError(f"mask must be bool or floating, not {given.dtype}")
        _expanded("mask", given, (batch, heads, rows, columns))
        mask = given.reshape((1,) * (4 - given.ndim) + tuple(given.shape))
    problem = Problem(
        query,
        key,
        width**-0.5 if scaling is None else float(scaling),
        softcap,
        float(temperature),
        options.get("causal", True),
        window,
        places,
        valid,
        mask=mask,
    )
    return problem if packed is None else _packed(problem, packed)


def _packed(problem: Problem, packed: Tensor) -> Problem:
    """Say of each row where the prompt it stands in begins and ends."""
    if packed.ndim != 1 or packed.numel() < 2:
        raise ValueError(f"packed {list(packed.shape)} must be [S + 1]: where S prompts begin, and where the last ends")
    check_whole("packed", packed)
    columns = problem.sizes[-1]
    # On a GPU the numbers would have to be waited for.
    if packed.device.type == "cpu":
        bounds = packed.tolist()
        if bounds[0] != 0 or bounds[-1] != columns or sorted(bounds) != bounds:
            raise ValueError(f"packed={bounds} must ascend from 0 to {columns}, the number of columns")
    packed = packed.to(problem.query.device, torch.int64)
    prompt = torch.searchsorted(packed, problem.stood_in().contiguous(), right=True)
    begins = packed[(prompt - 1).clamp(0, packed.numel() - 1)]
    return replace(problem, begins=begins, ends=packed[prompt.clamp(max=packed.numel() - 1)])


def _expanded(name: str, given: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return given.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} {list(given.shape)} must be {list(shape)}, or 1 where all are alike") from error
