"""MustDrop, its part inside the language model: drop what no text token looks at, in four steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import VisionSignal, top_indices
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerTokens, Schedule


@register("mustdrop", stage="in_llm", paper="arXiv 2411.10803", source="liuting20/MustDrop", vectors=True)
@dataclass(frozen=True)
class MustDrop(Schedule):
    """Drop in four steps what neither all text together nor any single text token looks at.

    A token goes when its share of what the text after the image gives to all visual tokens is below
    ``global_threshold`` and no text token gives it ``individual_threshold``. The tokens that mattered most to
    the class token of the vision encoder never go.

    The thresholds suit one kind of question on one model (TextVQA with about 192 tokens: 0.001 and 0.001; 128:
    0.0012 and 0.001; 64: 0.011 and 0.01) and take effect with ``keep=None``. With a ``keep``, the average over
    the layers, both thresholds are raised or lowered by one common factor until exactly the count due is left
    at each step; only their ratio matters then.

    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024. The
    official code renumbers positions and shortens the caches of earlier layers (``positions="compact"`` with
    ``truncate_cache=True``), which leaves their keys at positions that later layers do not share.

    Attributes:
        global_threshold: least share of the text's attention to visual tokens, in [0, 1].
        individual_threshold: least attention of any one text token, in [0, 1].
        key_share: share of the visual tokens, by attention of the class token, that are kept first.
        truncate_cache: after the prefill, cut the caches of the layers between the first and the last step
            down to the last survivors.
    """

    needs = frozenset({"attention", "cls_attention"})
    adaptive = True

    keep: int | float | None = 1 / 3
    layers: tuple[int | float, ...] = (3 / 32, 7 / 32, 11 / 32, 15 / 32)
    fractions: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    key_share: float = 0.08
    truncate_cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("global_threshold", "individual_threshold", "key_share"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1]")
        if self.keep is not None and not (self.global_threshold and self.individual_threshold):
            raise ValueError(
                f"keep={self.keep} scales both thresholds, so global_threshold={self.global_threshold} and "
                f"individual_threshold={self.individual_threshold} must be above 0"
            )

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the class token in the last block."""
        return {"cls_attention": VisionSignal("cls_attention", layer="last")} if self.key_share else {}

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the rows of the layer before."""
        return LayerRequest(event.layer - 1)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Leave the count to the thresholds where there is no ``keep``."""
        return None if self.keep is None else super().counts(total, depth, images)

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        """Cut the caches from the layer before the first step on."""
        layers = list(self.steps(depth))
        return [(layers[-1], layers[0] - 1, layers[-1])] if self.truncate_cache else []

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Keep the key tokens and what the text looks at."""
        total, largest = text_attention(tokens.view(), tokens.question, tokens.candidates)
        worth = threshold_margin(total, largest, self.global_threshold, self.individual_threshold)
        key = self._key_tokens(tokens)
        if kept is None:
            # At least one token survives, whatever the thresholds.
            kept = max(1, int(((worth >= 1.0) | key).sum()))
        order = worth.sort(descending=True, stable=True).indices
        order = order[key[order].to(torch.int8).sort(descending=True, stable=True).indices]
        return order[:kept].sort().values

    def _key_tokens(self, tokens: LayerTokens) -> Tensor:
        """Say which candidates are key tokens; they are chosen where nothing has been dropped yet."""
        if "key_tokens" not in tokens.memory:
            wanted = math.ceil(self.key_share * tokens.candidates.numel())
            found = top_indices(tokens.signals["cls_attention"], wanted) if wanted else tokens.origin[:0]
            tokens.memory["key_tokens"] = tokens.origin[found]
        return torch.isin(tokens.origin, tokens.memory["key_tokens"])


def text_attention(view: AttentionView, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Average the heads, then add up and take the largest of what ``rows`` give to each of ``columns``.

    Args:
        view: attention of one prompt.
        rows: ``[R]`` int64 query rows.
        columns: ``[V]`` int64 columns.

    Returns:
        The sum over the rows and the largest entry, float32 ``[V]`` each.

    Example:
        >>> view = AttentionView(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        >>> text_attention(view, torch.tensor([1, 3]), torch.tensor([0]))
        (tensor([0.7500]), tensor([0.5000]))
    """
    total, largest = view.column_sums_and_peaks(rows)
    return total[columns], largest[columns]


def threshold_margin(total: Tensor, largest: Tensor, global_threshold: float, individual_threshold: float) -> Tensor:
    """Say by which factor both thresholds may rise before a token goes; at 1 or above it stays.

    A token stays that reaches either threshold, so the larger of the two factors counts.

    Args:
        total: ``[V]`` float32 sums over the text rows.
        largest: ``[V]`` float32 largest entries.
        global_threshold: threshold of a token's share of all sums.
        individual_threshold: threshold of its largest entry.

    Returns:
        float32 ``[V]``; infinite where a threshold is 0.

    Example:
        >>> threshold_margin(torch.tensor([3.0, 1.0]), torch.tensor([0.1, 0.3]), 0.5, 0.2)
        tensor([1.5000, 1.5000])
    """
    factors = total / (global_threshold * total.sum()), largest / individual_threshold
    # Nothing lies below a threshold of 0, not even 0 itself.
    return torch.maximum(*factors).nan_to_num(nan=torch.inf, posinf=torch.inf)
