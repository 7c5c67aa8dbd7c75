"""MEDA: layers whose attention is spread out keep more; text comes first, and the rest is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmfast.kv.base import ModelEvictor
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.lookm import LookM
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_LOGITS = 1 << 22
"""Largest number of logits held at once (16 MiB)."""
_LEAST = 0.01
"""Least share of the prompt that a layer keeps."""
_TINY = 1e-12


@dataclass(frozen=True)
class Spread:
    """What one layer shows.

    Attributes:
        entropy: of its attention.
        received: float32 ``[G, n]``, what each entry receives.
        entries: keys and values, without the attention.
    """

    entropy: float
    received: Tensor
    entries: Entries


@register("meda", stage="cache", paper="arXiv 2502.17599", source="AIoT-MLSys-Lab/MEDA", vectors=True)
@dataclass(frozen=True)
class MEDA(ModelEvictor):
    """Give layers a budget by the entropy of their attention, and keep and merge in each as LOOK-M does.

    Half of what a layer gets are the newest entries, half what receives most attention; both are cut off. No layer
    keeps more than its prompt nor less than 1 %, so that where the entropies are far apart the model keeps less than
    ``keep``. All text stays, even where that is more.

    Paper: "MEDA: Dynamic KV Cache Allocation for Efficient Multimodal Long-Context Inference".

    Attributes:
        keep: entries per head, on average over the layers.
        entropy: ``"all"`` measures the whole attention, as the official code; ``"cross_modal"`` what text and
            visual entries give to each other, as the paper.
        merge: what goes into the entries that stay, as in ``lookm``.
        compat: ``"official"`` makes the newest entries as many as there is text with ``merge="pivotal"``, and merges
            out of step with ``merge="averaged"``, as in ``lookm``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    entropy: Literal["all", "cross_modal"] = "all"
    merge: Literal["pivotal", "weighted", "averaged", "none"] = "pivotal"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("entropy", self.entropy, ["all", "cross_modal"])
        check_choice("merge", self.merge, ["pivotal", "weighted", "averaged", "none"])
        check_choice("compat", self.compat, [None, "official"])

    def observe(self, entries: Entries) -> Spread:
        """Measure the attention of one layer."""
        entropy, received = attention_entropy(entries)
        if self.entropy == "cross_modal":
            entropy = cross_modal_entropy(entries)
        return Spread(entropy, received, replace(entries, attention=None))

    def settle(self, observed: Sequence[Spread]) -> list[Retained | None]:
        """Decide for every layer."""
        lengths = [len(layer.entries) for layer in observed]
        if all(self.keep_count(length) >= length for length in lengths):
            return [None] * len(observed)
        ratios = self.ratios([layer.entropy for layer in observed], lengths)
        return [self._kept(layer, ratio) for layer, ratio in zip(observed, ratios, strict=True)]

    def ratios(self, entropies: Sequence[float], lengths: Sequence[int]) -> list[float]:
        """Share out the budget over the layers.

        Args:
            entropies: of each layer.
            lengths: entries of each layer.

        Returns:
            The share of its entries that each layer keeps.
        """
        weights = torch.tensor(entropies, dtype=torch.float64).softmax(dim=0).tolist()
        found = []
        for weight, length in zip(weights, lengths, strict=True):
            keep = self.keep if isinstance(self.keep, float) else self.keep / length
            found.append(min(1.0, max(_LEAST, weight * len(lengths) * keep)))
        return found

    @staticmethod
    def half(ratio: float, length: int) -> int:
        """Say how many entries are kept for what they receive, and again because they are the newest.

        Example:
            >>> MEDA.half(0.2, 61)
            6
        """
        return int(length * ratio / 2)

    def _kept(self, layer: Spread, ratio: float) -> Retained | None:
        entries = layer.entries
        heavy = recent = self.half(ratio, len(entries))
        if self.compat == "official" and self.merge == "pivotal":
            recent = max(recent, int((~entries.visual).sum()))
        kept = max(1, heavy + recent)
        if kept >= len(entries):
            return None
        chooser = LookM(kept, recent / kept, self.merge, True, self.compat)
        mask = chooser.choose(layer.received, entries.visual, kept)
        if bool(mask.all()):
            return None
        if self.merge == "none":
            return Retained(mask)
        return Retained(mask, *chooser.merged(entries.keys, entries.values, mask))


def attention_entropy(entries: Entries) -> tuple[float, Tensor]:
    """Measure the whole attention of a prompt.

    Returns:
        the entropy of a row, mean over heads and rows; and what each entry receives, float32 ``[G, n]``, finite.

    Example:
        >>> zeros = torch.zeros(1, 2, 2)
        >>> entropy, received = attention_entropy(Entries.of(zeros, zeros, zeros))
        >>> round(entropy, 4), received.tolist()
        (0.3466, [[1.5, 0.5]])
    """
    view, length = entries.view, len(entries)
    device = entries.keys.device
    received = torch.zeros(view.heads, length, device=device)
    total = 0.0
    for _, block in view.blocks(torch.arange(length, device=device)):
        block = torch.nan_to_num(block)
        received += block.sum(dim=1)
        total += _entropy(block)
    return total / (view.heads * length), entries.per_group(received, "sum")


def cross_modal_entropy(entries: Entries) -> float:
    """Measure what text gives to visual entries and these to text, each as if there were nothing else.

    Every token sees every entry of the other kind, later ones too.

    Returns:
        the entropy of a row of text plus that of a visual row, mean over heads; 0 without entries of both kinds.

    Example:
        >>> zeros, visual = torch.zeros(1, 3, 2), torch.tensor([True, True, False])
        >>> round(cross_modal_entropy(Entries.of(zeros, zeros, zeros, visual)), 4)
        0.6931
    """
    view, total = entries.view, 0.0
    for seen in (entries.visual, ~entries.visual):
        rows = (~seen).nonzero().squeeze(-1)
        if not rows.numel() or rows.numel() == len(entries):
            return 0.0
        for part in rows.split(max(1, _LOGITS // (view.heads * view.key.shape[1]))):
            logits = view.logits(part, masked=False)[..., view.past :][..., seen]
            total += _entropy(torch.nan_to_num(logits.softmax(dim=-1))) / (view.heads * rows.numel())
    return total


def _entropy(probabilities: Tensor) -> float:
    return -float((probabilities * probabilities.clamp_min(_TINY).log()).double().sum())
