"""Run a model with kernels and without, and see which kernels a call has come to."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import mmfast
from support.checks import CLOSE, Generated, generate
from support.families import Batch

ENTRANCES = {
    "gather_decode": "attend_gathered",
    "masked_rect": "attend_rectangles",
    "quant_decode": "attend_codes",
    "tree_attention": "attend_tree",
}
"""Operation -> the function in which its Triton form begins."""


class Calls(dict[str, int]):
    """Operation -> how often its Triton form was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(dict.fromkeys(ENTRANCES, 0))
        for operation, entrance in ENTRANCES.items():
            module = importlib.import_module(f"mmfast.kernels.{operation}.triton")
            monkeypatch.setattr(module, entrance, self._counted(operation, getattr(module, entrance)))

    def _counted(self, operation: str, original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self[operation] += 1
            return original(*args, **kwargs)

        return counted

    def used(self) -> set[str]:
        """Return the operations that were called."""
        return {operation for operation, count in self.items() if count}


def generated(batch: Batch, plan: str, steps: int, attention: str = "sdpa", **options: Any) -> Generated:
    """Generate under a plan."""
    model = batch.family.model(attention)
    with mmfast.accelerate(model, plan):
        return generate(model, batch.inputs, steps, **options)


def compare(batch: Batch, plan: str, calls: Calls, steps: int = 3, attention: str = "sdpa") -> Generated:
    """Generate with kernels and without; every logit must be the same.

    Returns:
        What was generated without kernels.
    """
    with mmfast.kernels.use("torch"):
        off = generated(batch, plan, steps, attention)
        assert not calls.used()
    on = generated(batch, plan, steps, attention)
    assert torch.equal(on.tokens, off.tokens)
    assert (on.logits - off.logits).abs().max() < CLOSE
    return off
