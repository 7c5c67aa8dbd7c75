"""SparseMM: heads that look at images keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.adakv import ragged_mask, rounded
from mmfast.kv.eviction.h2o import check_share
from mmfast.kv.eviction.snapkv import SnapKV, fitting_window
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice


@register("sparsemm", stage="cache", paper="arXiv 2506.05344", source="CR400AF-A/SparseMM", vectors=True)
@dataclass(frozen=True)
class SparseMM(SnapKV):
    """Share out the budget over the heads of all layers by how much each looks at images.

    The scores of the heads are found once per model and come in a file; without one all heads keep the same. The
    window stays in every head. What a head cannot hold goes to the others.

    Paper: "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs".

    Attributes:
        keep: entries per head, on average over the heads of all layers.
        head_scores: path of a safetensors file with the tensor ``scores`` ``[layers, query heads]``, none of
            them negative; empty = all heads alike.
        min_share: share of ``keep`` (without the window) that every head gets.
        compat: ``"official"`` rounds each head for itself and loses what a head cannot hold.
    """

    ragged: ClassVar[bool] = True

    head_scores: str = ""
    min_share: float = 0.1
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("min_share", self.min_share)
        check_choice("compat", self.compat, [None, "official"])
        if not isinstance(self.head_scores, str):
            raise ValueError(f"head_scores={self.head_scores!r} must be the path of a file as text, or '' for none")
        if self.head_scores and not Path(self.head_scores).is_file():
            raise ValueError(f"head_scores={self.head_scores!r} is no file; give the path of one, or '' for none")
        if self.compat and self.entries != "all":
            raise ValueError(f"entries={self.entries!r} must be 'all' with compat='official', which knows no other")

    @cached_property
    def scores_by_head(self) -> Tensor | None:
        """The scores of the file, float64 ``[layers, H]``; None without a file.

        Raises:
            ValueError: if the file is damaged or holds something else.
        """
        return read_scores(self.head_scores) if self.head_scores else None

    def layer_count(self, entries: int, layer: int, depth: int) -> int:
        """Say how many of ``entries`` stay in one layer, on average over its heads."""
        average = self.keep_count(entries)
        scores = self.scores_by_head
        if scores is None or average >= entries:
            return average
        self._check_size(scores, depth)
        window = fitting_window(self.window, average, entries) if self.entries == "all" else 0
        spare, others = average - window, entries - window
        return window + capped_shares(depth * spare, scores.sum(-1).tolist(), self.least(spare), others)[layer]

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        average = self.keep_count(len(entries))
        if self.compat is None or average >= len(entries):
            return super().__call__(entries)
        mask = self.official_mask(entries, average)
        return None if bool(mask.all()) else Retained(mask)

    def official_mask(self, entries: Entries, average: int) -> Tensor:
        """Mark what the official code keeps.

        Args:
            entries: the entries.
            average: entries per head, over the heads of all layers.

        Returns:
            bool ``[G, n]``.
        """
        window = fitting_window(self.window, average, len(entries))
        shape = (entries.depth, entries.view.heads)
        budgets = self.head_budgets(average - window, shape, entries.heads)[entries.layer]
        return ragged_mask(self.scores(entries, average), budgets.to(entries.keys.device) + window)

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the entries of highest score in each head."""
        heads, scores = entries.heads, self.scores(entries, kept)
        forced = min(kept, int((scores == torch.inf).sum(dim=-1)[0]))
        weights = self._by_head(entries.view.heads, entries.depth, heads)[entries.layer].tolist()
        spare = kept - forced
        # A layer that gets little may hold less than what every head gets on average.
        least = min(spare, self.least(max(0, self.keep_count(len(entries)) - forced)))
        counts = capped_shares(heads * spare, weights, least, len(entries) - forced)
        return Retained(ragged_mask(scores, torch.tensor(counts, device=scores.device) + forced))

    def least(self, spare: int) -> int:
        """Say how many of ``spare`` entries every head gets."""
        return int(spare * self.min_share)

    def head_budgets(self, spare: int, shape: tuple[int, int], heads: int) -> Tensor:
        """Say how many entries beside the window each head gets in the official code, which may be more than there are.

        Args:
            spare: average over all heads.
            shape: number of layers, and of query heads H.
            heads: number G of key/value heads.

        Returns:
            int64 ``[layers, G]``.
        """
        shared = self._by_head(shape[1], shape[0], heads)
        shared = shared / shared.sum()
        least = self.least(spare)
        return torch.round(shared * ((spare - least) * shared.numel()) + least).long()

    def _by_head(self, queries: int, depth: int, heads: int) -> Tensor:
        """Add up the scores of the query heads that share a key/value head, float64 ``[layers, G]``."""
        scores = self.scores_by_head
        if scores is None:
            return torch.ones(depth, heads, dtype=torch.float64)
        self._check_size(scores, depth, queries)
        return rearrange(scores, "l (g r) -> l g r", g=heads).sum(dim=-1)

    def _check_size(self, scores: Tensor, depth: int, queries: int | None = None) -> None:
        layers, found = scores.shape
        if layers != depth or found != (found if queries is None else queries):
            needed = f"{depth} layers" if queries is None else f"{depth} layers with {queries} query heads each"
            raise ValueError(
                f"head_scores={self.head_scores!r} has scores of {layers} layers with {found} query heads each, but "
                f"this model has {needed}; give the file of this model, or '' for none"
            )


def read_scores(path: str) -> Tensor:
    """Read the scores of all heads.

    Returns:
        float64 ``[layers, H]``.

    Raises:
        ValueError: if the file is damaged, or holds no such scores.

    Example:
        >>> read_scores("nowhere.safetensors")
        Traceback (most recent call last):
        ValueError: head_scores='nowhere.safetensors' cannot be read as a safetensors file: ...
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"head_scores={path!r} cannot be read as a safetensors file: {error}") from None
    scores = tensors.get("scores")
    if scores is None or scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"head_scores={path!r} must hold a tensor 'scores' of shape [layers, query heads]")
    scores = scores.double()
    if not bool(scores.isfinite().all()) or bool((scores < 0).any()) or not bool(scores.sum() > 0):
        raise ValueError(f"head_scores={path!r}: 'scores' must be finite, not negative, and not all zero")
    return scores


def capped_shares(total: int, weights: Sequence[float], least: int, most: int) -> list[int]:
    """Split a count: everyone gets ``least``, the rest goes by weight, and nobody gets more than ``most``.

    Args:
        total: between ``least`` and ``most`` times the number of weights.
        weights: none of them negative.
        least: for everyone.
        most: for everyone; what is above goes to the others.

    Example:
        >>> capped_shares(20, [6.0, 1.0, 1.0, 0.0], 1, 8)
        [8, 6, 5, 1]
        >>> capped_shares(18, [1.0, 0.0, 0.0], 0, 8)
        [8, 5, 5]
    """
    room, rest = most - least, float(total - least * len(weights))
    parts = [0.0] * len(weights)
    open_places = list(range(len(weights)))
    while open_places:
        whole = sum(weights[place] for place in open_places)
        for place in open_places:
            parts[place] = rest * weights[place] / whole if whole > 0 else rest / len(open_places)
        full = [place for place in open_places if parts[place] > room]
        if not full:
            break
        for place in full:
            parts[place] = float(room)
        rest -= room * len(full)
        open_places = [place for place in open_places if place not in full]
    return [least + part for part in rounded(parts, total - least * len(weights))]
