"""VL-Cache: what comes after the images says what stays, and how much of it in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import ModelEvictor, top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice

_SPARSE = 0.01
"""Attention below this part of the largest in its row counts as none."""
_LEAST = 0.01
"""Least share of the prompt that a layer keeps."""
_WINDOW = 0.1
"""Share of the budget that are the newest entries."""


@dataclass(frozen=True)
class Observed:
    """What one layer shows.

    Attributes:
        sparsity: share of the attention of the last tokens that is next to nothing.
        importance: float32 ``[n]`` or ``[G, n]``.
    """

    sparsity: Tensor
    importance: Tensor

    def __len__(self) -> int:
        return int(self.importance.shape[-1])


@register("vl_cache", stage="cache", paper="arXiv 2410.23317", source="EffiVLM-Bench/EffiVLM-Bench", vectors=True)
@dataclass(frozen=True)
class VLCache(ModelEvictor):
    """Keep what the text after the images attends to, more of it in layers whose attention is less sparse.

    A tenth of the budget are the newest entries. What a layer gets is cut off, at least one entry and 1 % of the
    prompt, at most all of it, so that a model keeps somewhat more or less than ``keep``: with ``window="layer"``
    a tenth more, because the newest entries come on top there.

    Paper: "VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model Inference
    Acceleration". The authors published no code; the source is another group's.

    Attributes:
        keep: entries per head, on average over the layers.
        window: ``"shared"`` lets all layers keep the same number of newest entries, ``"layer"`` each a tenth of
            its own budget.
        per_head: let each head keep its own entries; otherwise the heads of a layer are added up.
        per_layer: let layers keep different numbers.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    window: Literal["shared", "layer"] = "shared"
    per_head: bool = True
    per_layer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("window", self.window, ["shared", "layer"])
        check_choice("per_head", self.per_head, [True, False])
        check_choice("per_layer", self.per_layer, [True, False])

    def observe(self, entries: Entries) -> Observed:
        """Look at the attention of what comes after the last visual entry."""
        sparsity, importance = after_vision(entries)
        return Observed(sparsity, entries.per_group(importance, "sum") if self.per_head else importance.sum(dim=0))

    def settle(self, observed: Sequence[Observed]) -> list[Retained | None]:
        """Decide for every layer."""
        if all(self.keep_count(len(layer)) >= len(layer) for layer in observed):
            return [None] * len(observed)
        fractions = self.fractions([layer.sparsity for layer in observed], [len(layer) for layer in observed])
        found = [self.choose(layer.importance, fraction) for layer, fraction in zip(observed, fractions, strict=True)]
        return [None if bool(mask.all()) else Retained(mask) for mask in found]

    def fractions(self, sparsity: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Share out the budget, in float32 and in the order of the source, for numbers are cut off later.

        Args:
            sparsity: of each layer.
            lengths: entries of each layer.

        Returns:
            float32 ``[layers]``, the share of its entries that each layer keeps beside the window.
        """
        part = 1.0 if self.window == "layer" else 1.0 - _WINDOW
        keep = [self._fraction(length) for length in lengths]
        if not self.per_layer:
            return torch.tensor([share * part for share in keep])
        dense = 1 - torch.stack([value.float().cpu() for value in sparsity])
        wanted = dense / dense.sum() * torch.tensor(keep) * part * len(keep)
        return torch.nan_to_num(wanted, nan=0.0).clamp(_LEAST * part, 1.0)

    def choose(self, importance: Tensor, fraction: Tensor) -> Tensor:
        """Mark the newest entries and the best of the others.

        Args:
            importance: ``[..., n]``.
            fraction: of the entries that are kept beside the newest.

        Returns:
            bool of the same shape.
        """
        length = importance.shape[-1]
        share = (
            float(fraction * length * _WINDOW) if self.window == "layer" else length * self._fraction(length) * _WINDOW
        )
        window = min(length, max(1, int(share)))
        others = min(length - window, max(1, int(fraction * length)))
        mask = top_mask(importance[..., : length - window], others)
        return functional.pad(mask, (0, window), value=True)

    def _fraction(self, length: int) -> float:
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep / length)


def after_vision(entries: Entries) -> tuple[Tensor, Tensor]:
    """Look at the attention of what comes after the last visual entry; of the last token where nothing does.

    Returns:
        sparsity, a float32 number: the share of what the rows can see that is next to nothing, mean over
        heads; and importance, float32 ``[H, n]``: what each entry receives.

    Example:
        >>> states, visual = torch.zeros(1, 4, 2), torch.tensor([False, True, False, False])
        >>> sparsity, importance = after_vision(Entries.of(states, states, states, visual))
        >>> sparsity.item(), [round(value, 3) for value in importance[0].tolist()]
        (0.0, [0.583, 0.583, 0.583, 0.25])
    """
    length, view = len(entries), entries.view
    device = entries.keys.device
    rows = torch.arange(length - max(1, entries.after_media), length, device=device)
    importance = torch.zeros(view.heads, length, device=device)
    dense = torch.zeros(view.heads, device=device)
    visible = 0
    for places, block in view.blocks(rows):
        block = torch.nan_to_num(block)
        highest = block.amax(dim=-1, keepdim=True)
        # Tokens that do not look themselves have rows of zeros.
        looks = highest > 0
        dense += ((block >= _SPARSE * highest) & looks).sum(dim=(1, 2))
        visible += int((rows[places] + 1)[looks[..., 0].any(dim=0)].sum())
        importance += block.sum(dim=1)
    sparsity = (visible - dense) / visible if visible else torch.zeros_like(dense)
    return sparsity.mean(), importance
