"""SpecPC: whole neighbourhoods of the prompt, the same in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmfast.kv.base import ModelEvictor
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.snapkv import check_kernel, check_window, fitting_window, pooled
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("spec_pc", stage="cache", paper="arXiv 2506.08373", source="furiosa-ai/draft-based-approx-llm", vectors=True)
@dataclass(frozen=True)
class SpecPC(ModelEvictor):
    """Keep the tokens that the end of the prompt attends to together with their neighbours, in all layers.

    The paper asks a small model which tokens of a text prompt matter and leaves the others out before the large
    one reads it, with positions closed up. Images cannot be read with holes in them, so here it is the model's
    own attention, summed over layers, heads and the last queries, that is asked, and what does not matter goes
    when the prompt has been read: entries keep their positions, and visual tokens compete like all others.

    Paper: "Draft-based Approximate Inference for LLMs".

    Attributes:
        keep: entries of the prompt in every layer and head, its end included.
        window: last tokens of the prompt whose attention counts, and which stay; less where the budget leaves
            no room beside them.
        kernel: width of the pooling, odd.
        pooling: ``"max"`` or ``"avg"`` (with zeros beyond the ends).
        neighbors: width of the neighbourhood that comes with each token; None = ``kernel``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    window: int = 64
    kernel: int = 13
    pooling: Literal["max", "avg"] = "max"
    neighbors: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, ["max", "avg"])
        width = self.neighbors
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 0):
            raise ValueError(f"neighbors={width!r} must be an int of at least 0: a number of tokens; None = kernel")

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Predict how many entries of a prompt one layer holds per head."""
        return self.keep_count(visual + text)

    def observe(self, entries: Entries) -> Any:
        """Add up what the end of the prompt attends to."""
        window = fitting_window(self.window, self.keep_count(len(entries)), len(entries))
        return entries.last_rows(window).float().sum(dim=(0, 1))

    def settle(self, observed: Sequence[Any]) -> list[Retained | None]:
        """Choose once for all layers, if all of them read the same tokens, else for each by itself."""
        if len({received.shape for received in observed}) > 1:
            return [self._settled(received) for received in observed]
        return [self._settled(torch.stack(list(observed)).sum(dim=0))] * len(observed)

    def _settled(self, received: Tensor) -> Retained | None:
        length = received.numel()
        kept = self.keep_count(length)
        if kept >= length:
            return None
        stays = torch.zeros(length, dtype=torch.bool, device=received.device)
        stays[self.chosen(received, kept, fitting_window(self.window, kept, length))] = True
        return Retained(stays)

    def chosen(self, received: Tensor, kept: int, window: int) -> Tensor:
        """Choose tokens of a prompt.

        Args:
            received: float32 ``[n]``, what each token is attended to.
            kept: how many stay.
            window: last tokens that stay in any case.

        Returns:
            int64 ``[kept]``, ascending.

        Example:
            >>> received = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.1])
            >>> SpecPC(kernel=1, neighbors=3).chosen(received, 4, 1).tolist()
            [1, 2, 3, 6]
        """
        length = received.numel()
        score = torch.nan_to_num(pooled(received[None], self.kernel, self.pooling)[0], nan=-torch.inf)
        best = score.sort(descending=True, stable=True).indices[:kept]
        reach = (self.kernel if self.neighbors is None else self.neighbors) // 2
        offsets = torch.arange(-reach, reach + 1, device=received.device)
        offsets = offsets[offsets.abs().sort(stable=True).indices]
        around = best[:, None] + offsets
        last = torch.arange(length - window, length, device=received.device)
        order = torch.cat([last, around[(around >= 0) & (around < length)]])
        # A token counts where it is named first.
        first = torch.full((length,), order.numel(), device=received.device)
        first.scatter_reduce_(0, order, torch.arange(order.numel(), device=received.device), "amin")
        return first.sort(stable=True).indices[:kept].sort().values
