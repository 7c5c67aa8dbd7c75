"""KVQuant: few bits for what is ordinary, outliers exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import (
    Concatenated,
    Joined,
    Patched,
    Raw,
    Side,
    affine,
    check_bits,
    join_heads,
    usable,
    whole_chunks,
)
from mmfast.registry import register


@register("kvquant", stage="cache", paper="arXiv 2401.18079", source="SqueezeAILab/KVQuant", vectors=True)
@dataclass(frozen=True)
class KVQuant(Packer):
    """Quantise keys per channel and values per token, and store the outliers exactly.

    Outliers are what lies beyond two quantiles of a channel (keys, over the tokens of a block) or of a token
    (values, over the channels of all heads), so that they do not stretch the range of the codes. The paper
    stores keys before the position embedding; here they are stored after it, because the cache of the model
    never sees them without. Codes are evenly spaced; the paper's uneven ones need a calibration with gradients.

    Paper: "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization".

    Attributes:
        bits: 2, 3, 4, 5 or 8.
        threshold: share of the numbers that are no outliers; 1.0 = there are none.
        first: entries at the start of the prompt that stay as they are.
    """

    bits: int = 4
    threshold: float = 0.99
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, [2, 3, 4, 5, 8])
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be above 0 and at most 1: a share of the numbers")
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 0:
            raise ValueError(f"first={self.first!r} must be an int of at least 0: entries that stay as they are")

    def due(self, loose: int, side: Side) -> int:
        """Pack keys ``residual`` at a time, and values as soon as ``residual`` newer ones are there."""
        return whole_chunks(loose, self.residual) if side == "key" else super().due(loose, side)

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Quantise a block; the start of the prompt stays as it is."""
        first = 0 if entries is None else min(self.first, states.shape[1])
        exact, rest = Raw.of(states[:, :first]), states[:, first:]
        if not rest.shape[1]:
            return exact
        axis = 1 if side == "key" else 2
        block = with_outliers(join_heads(rest), axis, self.bits, self.threshold, whole_offset=side == "value")
        joined = Joined(block, states.shape[0])
        return Concatenated([exact, joined]) if first else joined


def with_outliers(states: Tensor, axis: int, bits: int, threshold: float, *, whole_offset: bool) -> Packed:
    """Quantise what lies along one axis together, but for its outliers.

    Args:
        states: ``[G, n, d]``.
        axis: 1 to quantise each channel, 2 to quantise each token.
        bits: bits of a code.
        threshold: share of the numbers that are no outliers.
        whole_offset: let a code stand for zero: the offset becomes a whole number of codes, and none of one sign
            is left out.

    Example:
        >>> states = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0, 90.0, -50.0]]])
        >>> bool((with_outliers(states, 2, 2, 0.8, whole_offset=False).restore() == states).all())
        True
    """
    steps = 2**bits - 1
    outliers = outlier_mask(states, axis, threshold)
    plain = torch.where(outliers, states.float().median(dim=axis, keepdim=True).values, states.float())
    low, high = plain.amin(dim=axis, keepdim=True), plain.amax(dim=axis, keepdim=True)
    scale = usable((high - low) / steps, torch.float32)
    if whole_offset:
        low = (low / scale).round().clamp(-steps, 0) * scale
    block = affine(plain, low, scale, steps + 1, axis, states.dtype)
    return Patched.of(block, states, outliers) if threshold < 1 else block


def outlier_mask(states: Tensor, axis: int, threshold: float) -> Tensor:
    """Mark what lies on or beyond the quantiles ``(1 - threshold) / 2`` from both ends.

    Args:
        states: ``[G, n, d]``.
        axis: along which quantiles are taken.
        threshold: share of the numbers between them; 1.0 marks nothing.

    Returns:
        bool of the same shape.

    Example:
        >>> outlier_mask(torch.tensor([[[5.0, 1.0, 2.0, 3.0, 4.0]]]), 2, 0.9).tolist()
        [[[True, True, False, False, False]]]
    """
    if threshold >= 1:
        return torch.zeros_like(states, dtype=torch.bool)
    # torch.quantile refuses more than 16 million numbers, which a long prompt has.
    order = states.float().sort(dim=axis).values
    upper = 1 - (1 - threshold) / 2
    low, high = (_between(order, axis, share) for share in (1 - upper, upper))
    return (states.float() <= low) | (states.float() >= high)


def _between(order: Tensor, axis: int, share: float) -> Tensor:
    """Interpolate a quantile of sorted numbers, with the axis kept at size 1."""
    place = torch.tensor(share, dtype=torch.float32) * (order.shape[axis] - 1)
    below = int(place)
    above = min(below + 1, order.shape[axis] - 1)
    lower, upper = order.narrow(axis, below, 1), order.narrow(axis, above, 1)
    return torch.lerp(lower, upper, float(place - below))
