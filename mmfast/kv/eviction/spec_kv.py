"""SpecKV: the first words of the answer say what the prompt is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmfast.kv.base import Evictor, top_mask
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.snapkv import check_kernel, check_window, fitting_window, forced_window, pooled
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("spec_kv", stage="cache", paper="arXiv 2506.08373", source="furiosa-ai/draft-based-approx-llm", vectors=True)
@dataclass(frozen=True)
class SpecKV(Evictor):
    """Keep the entries that the end of the prompt and the first tokens of the answer attend to.

    The paper lets a small model draft the answer and reads its tokens with the prompt. Here the look-ahead
    are the model's own first tokens: until ``lookahead`` of them have been generated every step reads the
    whole prompt, then it is evicted. The end of the prompt and what has been generated always stay.

    Paper: "Draft-based Approximate Inference for LLMs".

    Attributes:
        keep: entries of the prompt per head, its end included.
        lookahead: tokens of the answer that are waited for.
        window: last tokens of the prompt whose attention counts too; less where the budget leaves no room
            beside it.
        kernel: width of the pooling, odd.
        pooling: ``"max"`` or ``"avg"`` (with zeros beyond the ends).
        reduce: how the tokens, and the query heads that share a key/value head, are put together.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    lookahead: int = 16
    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"
    reduce: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lookahead, bool) or not isinstance(self.lookahead, int) or self.lookahead < 1:
            raise ValueError(f"lookahead={self.lookahead!r} must be an int of at least 1: a number of tokens")
        check_window(self.window)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, ["max", "avg"])
        check_choice("reduce", self.reduce, ["max", "mean"])

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Predict what is held after the prompt: everything, until the look-ahead is complete."""
        return visual + text

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Choose by the end of the prompt alone, as if there were no look-ahead."""
        window = fitting_window(self.window, kept, len(entries))
        received = self.received(entries.last_rows(window), entries.heads)
        return Retained(top_mask(self.score(received, window), kept))

    def __call__(self, entries: Entries) -> Retained | None:
        """Note what the end of the prompt attends to, and keep everything for now."""
        kept = self.keep_count(len(entries))
        if kept < len(entries):
            window = fitting_window(self.window, kept, len(entries))
            entries.memory["received"] = self.received(entries.last_rows(window), entries.heads)
        return None

    def step(self, step: Step) -> Tensor | None:
        """Add the attention of the new token; evict once there are enough of them."""
        received = step.memory.get("received")
        if received is None:
            return None
        length = received.shape[-1]
        before = len(step) - step.added - length
        new = self.received(step.probabilities()[:, None, before : before + length], step.heads)
        received = torch.maximum(received, new) if self.reduce == "max" else received + new
        step.memory["received"] = received
        if step.added < self.lookahead:
            return None
        del step.memory["received"]
        kept = self.keep_count(length)
        chosen = top_mask(self.score(received, fitting_window(self.window, kept, length)), kept)
        stays = torch.ones(step.heads, len(step), dtype=torch.bool, device=chosen.device)
        stays[:, before : before + length] = chosen
        return stays

    def received(self, rows: Tensor, heads: int) -> Tensor:
        """Put rows of attention together.

        Args:
            rows: ``[H, w, n]``.
            heads: number G of key/value heads.

        Returns:
            float32 ``[G, n]``: the largest entry, or the sum over the rows averaged over the query heads.

        Example:
            >>> SpecKV().received(torch.tensor([[[0.1, 0.9]], [[0.6, 0.4]]]), 1).tolist()
            [[0.6000000238418579, 0.8999999761581421]]
        """
        grouped = rows.float().unflatten(0, (heads, -1))
        reduced: Tensor = grouped.amax(dim=(1, 2)) if self.reduce == "max" else grouped.mean(dim=1).sum(dim=1)
        return reduced

    def score(self, received: Tensor, window: int) -> Tensor:
        """Smooth what stands before the window over its neighbours and force the window, ``[G, n]``."""
        before = received.shape[-1] - window
        return forced_window(pooled(received[:, :before], self.kernel, self.pooling), window)
