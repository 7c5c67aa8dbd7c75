"""SnapKV: the end of the prompt says what the rest of it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("snapkv", stage="cache", paper="arXiv 2404.14469", source="FasterDecoding/SnapKV", vectors=True)
@dataclass(frozen=True)
class SnapKV(CacheScorer):
    """Keep the entries that the last tokens of the prompt attend to, smoothed over their neighbours.

    The window itself always stays. Query heads that share a key/value head are averaged before pooling;
    the official code stores the cache once per query head.

    Paper: "SnapKV: LLM Knows What You are Looking for Before Generation".

    Attributes:
        keep: entries per head, the window included.
        window: number of last tokens whose attention counts; less where the budget leaves no room beside it.
        kernel: width of the pooling, odd.
        pooling: ``"avg"`` (with zeros beyond the ends, as the official code) or ``"max"``.
        reduce: how query heads that share a key/value head are put together.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, ["avg", "max"])
        check_choice("reduce", self.reduce, ["mean", "max"])

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the pooled attention of the window, ``[G, n]``; the window itself is forced."""
        window = fitting_window(self.window, kept, len(entries))
        rows = entries.last_rows(window)
        return forced_window(self.window_score(rows, entries), window)

    def window_score(self, rows: Tensor, entries: Entries) -> Tensor:
        """Score what stands before the window.

        Args:
            rows: ``[H, w, n]`` attention of the window.
            entries: the entries.

        Returns:
            float32 ``[G, n - w]``.
        """
        window = rows.shape[1]
        mean = rows[..., : len(entries) - window].mean(dim=1)
        return pooled(entries.per_group(mean, self.reduce), self.kernel, self.pooling)


def fitting_window(window: int, kept: int, entries: int) -> int:
    """Limit a window so that something beside it can survive; at least one token.

    Example:
        >>> fitting_window(32, 128, 600), fitting_window(32, 10, 600)
        (32, 9)
    """
    return max(1, min(window, kept - 1, entries - 1))


def forced_window(scores: Tensor, window: int) -> Tensor:
    """Append the window, which always stays, to scores ``[G, n - w]``."""
    return torch.cat([scores, scores.new_full((*scores.shape[:-1], window), torch.inf)], dim=-1)


def pooled(scores: Tensor, kernel: int, pooling: Literal["avg", "max"]) -> Tensor:
    """Smooth scores ``[G, n]`` over their neighbours; same shape.

    Example:
        >>> pooled(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), 3, "avg").tolist()
        [[1.0, 1.0, 1.0, 0.0]]
        >>> pooled(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), 3, "max").tolist()
        [[3.0, 3.0, 3.0, 0.0]]
    """
    if pooling == "avg":
        return functional.avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
    return functional.max_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]


def check_window(window: object) -> None:
    """Refuse a window that is no positive number of tokens.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window!r} must be an int of at least 1: a number of tokens")


def check_kernel(kernel: object) -> None:
    """Refuse a width of pooling that is not odd.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel!r} must be an odd int of at least 1")
