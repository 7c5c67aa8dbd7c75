"""Decode with compiled steps and without, and compare what comes out and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.kv.cache import BOOKS
from support.checks import CLOSE, Generated
from support.families import Batch

STEPS = 12
BOTH = "uniform(keep=0.6) + pyramiddrop(keep=0.25)"
"""A plan under which layers store different numbers of tokens."""


def answers(model: Any, batch: Batch, steps: int = STEPS, **options: Any) -> Tensor:
    options = {"do_sample": False, **options}
    found: Tensor = model.generate(**batch.inputs, max_new_tokens=steps, **options)
    return found


def both(model: Any, plan: str, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Run something under a plan and under the same plan with compiled steps, which must really run."""
    with mmfast.accelerate(model, plan):
        expected = run(model)
    with mmfast.accelerate(model, plan, compile=True) as fast:
        found = run(model)
        record = fast.report().compilation
    assert record is not None
    assert record.failure == ""
    assert record.steps > 0
    return expected, found


def check_alike(expected: Generated, found: Generated) -> None:
    """Compare tokens, logits, and everything that two caches hold and know."""
    assert torch.equal(expected.tokens, found.tokens)
    assert (expected.logits - found.logits).abs().max() < CLOSE
    layers = zip(expected.output.past_key_values.layers, found.output.past_key_values.layers, strict=True)
    for one_layer, other in layers:
        if not hasattr(one_layer, "slots"):
            # Without anything to do the plan leaves the cache to transformers.
            assert one_layer.get_seq_length() == other.get_seq_length()
            continue
        for name in BOOKS:
            book, own = getattr(one_layer, name), getattr(other, name)
            assert torch.equal(book, own) if isinstance(book, Tensor) else book == own, name
        for name in ("keys", "values"):
            assert getattr(one_layer, name).shape == getattr(other, name).shape
            assert (getattr(one_layer, name) - getattr(other, name)).abs().max() < CLOSE
