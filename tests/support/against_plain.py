"""Decode with a drafter and without one, and compare."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.adapters import for_model
from mmfast.adapters.drafting import DraftingRunner
from mmfast.decoding import Drafting
from support.families import Batch
from support.prompts import PAD

STEPS = 18


def decoded(model: Any, batch: Batch, steps: int = STEPS, **options: Any) -> Tensor:
    """Return prompts and answers."""
    options = {"do_sample": False, **options}
    found: Tensor = model.generate(**batch.inputs, max_new_tokens=steps, **options)
    return found


def check(
    batch: Batch, plan: str, *, beside: str = "", draft_model: Any = None, model: Any = None, **options: Any
) -> Drafting:
    """Compare the tokens of a drafter with those of the same model, under the plan beside it.

    Args:
        batch: the prompts.
        plan: the drafter.
        beside: the rest of the plan.
        draft_model: for drafters that want one.
        model: the model; that of the family where None.
        options: of ``generate``.

    Returns:
        What drafting gave.
    """
    model = batch.family.model() if model is None else model
    with mmfast.accelerate(model, beside) if beside else nullcontext():
        expected = decoded(model, batch, **options)
    both = f"{beside} + {plan}" if beside else plan
    with mmfast.accelerate(model, both, draft_model=draft_model) as fast:
        found = decoded(model, batch, **options)
        record = fast.report().drafting
    assert torch.equal(found, expected)
    assert record is not None
    assert record.emitted == (options.get("steps", STEPS) - 1) * len(batch)
    return record


def rounds_when_right(num_draft: int, rows: int = 1, steps: int = STEPS) -> int:
    """Return the rounds it takes when every drafted token is right."""
    return -(-(steps - 1) // (num_draft + 1)) * rows


def unsaid(model: Any) -> dict[str, Any]:
    """Options of ``generate`` that keep a random model from saying what is never drafted."""
    runner = DraftingRunner.__new__(DraftingRunner)
    runner.adapter = for_model(model)
    config = SimpleNamespace(_eos_token_tensor=None, _pad_token_tensor=torch.tensor(PAD))
    return {"suppress_tokens": sorted(runner._excluded(config))}
