"""What the attention modules of a decoder attend with, noted beside their family's own eager function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.token_pruning.attention import AttentionView


@dataclass(frozen=True)
class Attended:
    """One run of one attention module on one sequence.

    Attributes:
        query: ``[H, n, d]``.
        key, value: ``[G, n, d]``.
        scaling, softcap: as the family's eager function got them.
        mask: ``[n, n]`` additive, or None where all see all or causality says it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    softcap: float | None
    mask: Tensor | None

    def view(self, rows: Tensor, columns: Tensor, visible: Tensor) -> AttentionView:
        """Show some tokens' attention.

        Args:
            rows: ``[n]`` places of the tokens.
            columns: ``[past + n]`` places of what they may look at; the last n are the tokens themselves.
            visible: bool, who may look at whom, over all places.
        """
        return AttentionView(
            self.query[:, rows],
            self.key[:, columns],
            self.value[:, columns],
            self.scaling,
            self.softcap,
            visible[rows][:, columns],
        )


class Recording:
    """Note what modules attend with, from ``with`` on; the last run of each module stays.

    Args:
        modules: the attention modules, of one or of several files of transformers.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.files: list[Any] = [sys.modules[name] for name in sorted({type(module).__module__ for module in modules})]
        self.runs: dict[nn.Module, list[Attended]] = {}

    def __enter__(self) -> Recording:
        self.originals = [file.eager_attention_forward for file in self.files]
        for file, original in zip(self.files, self.originals, strict=True):
            file.eager_attention_forward = self._noting(original)
        return self

    def __exit__(self, *_: object) -> None:
        for file, original in zip(self.files, self.originals, strict=True):
            file.eager_attention_forward = original

    def last(self, module: nn.Module) -> Attended:
        """Return the latest run of a module."""
        return self.runs[module][-1]

    def _noting(self, original: Any) -> Any:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
            mask: Tensor | None = args[0] if args else kwargs["attention_mask"]
            masks = [None] * len(query) if mask is None else mask.expand(len(query), *mask.shape[1:])[:, 0]
            self.runs.setdefault(module, []).extend(
                Attended(*states, scaling, softcap, own) for *states, own in zip(query, key, value, masks, strict=True)
            )
            return original(module, query, key, value, *args, **kwargs)

        return attend


def unrotated(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosines and sines that rotate by nothing."""
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])
