"""From ``keep`` to counts, layer schedules, FLOPs and KV bytes, without running a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


def check_keep(keep: object, *, field: str = "keep") -> None:
    """Refuse anything that is neither a count nor a fraction.

    Raises:
        TypeError: if ``keep`` is not an int or a float (bool included).
        ValueError: if a count is below 1 or a fraction is outside (0, 1].

    Example:
        >>> check_keep(64); check_keep(0.25)
        >>> check_keep(0)
        Traceback (most recent call last):
        ValueError: keep=0 must be at least 1 as a count (int); a fraction in (0, 1] is a float
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(
            f"{field}={keep!r} must be a count (int >= 1) or a fraction (float in (0, 1]); "
            "note that 1 is one token and 1.0 is all of them"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"{field}={keep} must be at least 1 as a count (int); a fraction in (0, 1] is a float")
    elif not 0.0 < keep <= 1.0:
        example = max(1, round(keep)) if math.isfinite(keep) else 1
        raise ValueError(
            f"{field}={keep} must lie in (0, 1] as a fraction (float); write {field}={example} for a count"
        )


def count(keep: int | float, total: int) -> int:
    """Turn ``keep`` into a number of tokens out of ``total``.

    A fraction is rounded half to even, which is what the official code of most methods does; the
    result is at least 1 and at most ``total``.

    Args:
        keep: count (int) or fraction (float in (0, 1]).
        total: number of candidates.

    Raises:
        TypeError, ValueError: as :func:`check_keep`.

    Example:
        >>> count(64, 576), count(0.098, 576), count(0.5, 49), count(64, 10)
        (64, 56, 24, 10)
    """
    check_keep(keep)
    wanted = keep if isinstance(keep, int) else round(keep * total)
    return min(max(1, wanted), total)


def truncated_count(keep: int | float, total: int) -> int:
    """As :func:`count`, but a fraction is cut off instead of rounded (PyramidDrop and others).

    As in the official code the product is cut off in binary, so 0.29 of 100 is 28.

    Example:
        >>> truncated_count(0.5, 49), truncated_count(0.1, 50)
        (24, 5)
    """
    check_keep(keep)
    wanted = keep if isinstance(keep, int) else int(keep * total)
    return min(max(1, wanted), total)


def resolve_layer(layer: int | float, depth: int) -> int:
    """Turn a layer, absolute (int) or relative (float in (0, 1)), into an index below ``depth``.

    Raises:
        ValueError: if the layer is 0 or beyond the last one.

    Example:
        >>> resolve_layer(0.25, 32), resolve_layer(2, 32)
        (8, 2)
    """
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise TypeError(f"layer={layer!r} must be an int (index) or a float in (0, 1) (relative depth)")
    index = layer if isinstance(layer, int) else max(1, round(layer * depth))
    if not 1 <= index < depth:
        raise ValueError(
            f"layer={layer} means layer {index}, which must lie in 1..{depth - 1} for a model of {depth} layers: "
            "tokens can only be dropped between two layers"
        )
    return index


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Split a count in proportion to ``weights``; what rounding leaves goes to the largest remainders.

    Example:
        >>> shares(10, [576, 288, 288]), shares(3, [1, 1])
        ([5, 3, 2], [2, 1])
    """
    whole = sum(weights)
    if whole == 0:
        return [0] * len(weights)
    exact = [total * weight / whole for weight in weights]
    parts = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def average_of(fractions: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Average what the layers read when ``fractions[i]`` of the tokens are left from ``layers[i]`` on.

    Example:
        >>> average_of([0.5, 0.25, 0.125], [8, 16, 24], 32)
        0.46875
    """
    bounds = [0, *layers, depth]
    spans = [after - before for before, after in itertools.pairwise(bounds)]
    return sum(span * left for span, left in zip(spans, [1.0, *fractions], strict=True)) / depth


def solve_average(keep: float, profile: Sequence[float], layers: Sequence[int], depth: int) -> list[float]:
    """Scale a schedule so that its average over all layers is ``keep``.

    The profile ``f_i`` becomes ``f_i ** x``: steps keep their proportions on a logarithmic scale, x = 0
    drops nothing, and the larger x the more goes. Where even dropping (almost) everything leaves more
    than ``keep``, because the layers before the first step read all tokens, the least is returned.

    Args:
        keep: wanted average fraction over the ``depth`` layers, in (0, 1].
        profile: what is left after each step at some setting of the schedule, each in (0, 1).
        layers: layers before which tokens are dropped, ascending.
        depth: number of layers.

    Returns:
        What is left after each step.

    Example:
        >>> solve_average(0.46875, [0.5, 0.25, 0.125], [8, 16, 24], 32)
        [0.5, 0.25, 0.125]
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        scaled = [fraction**middle for fraction in profile]
        low, high = (middle, high) if average_of(scaled, layers, depth) > keep else (low, middle)
    # Binary fractions such as one half must come out exactly, or cutting off would lose a token.
    return [round(fraction**low, 10) for fraction in profile]


@dataclass(frozen=True)
class LanguageShape:
    """The sizes of a language model that decide its cost.

    Attributes:
        layers: number of decoder layers.
        hidden: width D.
        intermediate: width of the feed-forward part M.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        head_dim: width of one head.
        feed_forward_matrices: 3 for gated feed-forward parts (Llama, Qwen), 2 for plain ones.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward_matrices: int = 3

    def layer_flops(
        self, tokens: int, context: int | None = None, *, projected: int | None = None, fed: int | None = None
    ) -> int:
        """Count the multiply-accumulates of one layer, the unit the literature calls FLOPs.

        ``4nD^2 + 2n^2 D + 3nDM`` for a multi-head, gated layer; grouped-query attention shrinks the
        key and value projections.

        Args:
            tokens: tokens n that attend.
            context: tokens attended to; ``tokens`` when None.
            projected: tokens of which keys and values are made; ``tokens`` when None.
            fed: tokens that pass the feed-forward part; ``tokens`` when None.

        Example:
            >>> llava = LanguageShape(32, 4096, 11008, 32, 32, 128)
            >>> round(32 * llava.layer_flops(576) / 1e12, 3)
            3.817
        """
        context = tokens if context is None else context
        projected = tokens if projected is None else projected
        fed = tokens if fed is None else fed
        query_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        projections = 2 * tokens * self.hidden * query_width + 2 * projected * self.hidden * kv_width
        attention = 2 * tokens * context * query_width
        feed_forward = self.feed_forward_matrices * fed * self.hidden * self.intermediate
        return projections + attention + feed_forward

    def kv_bytes(self, tokens_per_layer: Sequence[int], bytes_per_value: int = 2) -> int:
        """Predict the size of the key/value cache in bytes.

        Example:
            >>> LanguageShape(2, 64, 128, 4, 2, 16).kv_bytes([10, 5], 4)
            3840
        """
        return sum(2 * n * self.kv_heads * self.head_dim * bytes_per_value for n in tokens_per_layer)


def prefill_flops(shape: LanguageShape, tokens_per_layer: Sequence[int]) -> int:
    """Add up the multiply-accumulates of a prefill whose layer l reads ``tokens_per_layer[l]`` tokens.

    Example:
        >>> llava = LanguageShape(32, 4096, 11008, 32, 32, 128)
        >>> round(prefill_flops(llava, [576] * 2 + [288] * 30) / 1e12, 3)
        2.007
    """
    return sum(shape.layer_flops(n) for n in tokens_per_layer)


@dataclass(frozen=True)
class Prediction:
    """What a plan will do to a prompt, worked out without running a model.

    Attributes:
        entered: visual tokens that enter the language model.
        tokens_per_layer: tokens that attend in each layer, text included.
        layer_average: visual tokens per layer, averaged over the layers.
        flops: multiply-accumulates of the prefill of the language model.
        full_flops: the same without the plan.
        kv_bytes: bytes of the keys and values after the prefill; None where the data decide, or they are packed.
        full_kv_bytes: the same without the plan.
    """

    entered: int
    tokens_per_layer: tuple[int, ...]
    layer_average: float
    flops: int
    full_flops: int
    kv_bytes: int | None
    full_kv_bytes: int
