"""What several tests do: generate, compare with the reference, and take stock of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfast
from mmfast.token_pruning.base import Method
from support.families import Batch
from support.reference import expected

STEPS = 8
CLOSE = 1e-4
"""Largest difference of logits in float32; the largest measured is 2e-5."""
FAR = 0.1
"""Least difference that pruning must make, or a comparison proves nothing."""


@dataclass(frozen=True)
class Generated:
    """What ``generate`` gave.

    Attributes:
        tokens: ``[B, T]`` new tokens.
        logits: ``[B, T, V]`` raw logits they were chosen from.
        output: everything.
    """

    tokens: Tensor
    logits: Tensor
    output: Any


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **options: Any) -> Generated:
    """Generate and keep the logits."""
    options = {"do_sample": False, **options}
    output = model.generate(**inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **options)
    logits = torch.stack(output.logits, dim=1)
    return Generated(output.sequences[:, -logits.shape[1] :], logits, output)


def first_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the logits ``[B, V]`` after the prompt from a plain forward pass."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[:, -1]
    return logits


def check_against_reference(
    batch: Batch, plan: str | Sequence[Method], attention: str = "sdpa", steps: int = STEPS, *, far: float = FAR
) -> mmfast.Report:
    """Generate a batch under a plan and compare every logit, every count and every kept place of every row."""
    model = batch.family.model(attention)
    untouched = first_logits(model, batch.inputs)
    with mmfast.accelerate(model, plan) as fast:
        done = generate(model, batch.inputs, steps)
        report = fast.report()
    for row in range(len(batch)):
        check_row(batch.alone(row), plan, row, done, report)
        if batch.media[row]:
            assert (done.logits[row, 0] - untouched[row]).abs().max() > far
    return report


def check_row(alone: Batch, plan: str | Sequence[Method], row: int, done: Generated, report: mmfast.Report) -> None:
    """Compare one row of what was generated with what the reference computes of it alone."""
    wanted = expected(alone, plan, done.tokens[row, :-1].tolist())
    work = [(len(layer.attending), len(layer.shown), len(layer.fed)) for layer in wanted.work]
    assert [(layer.attending, layer.shown, layer.fed) for layer in report.work[row]] == work
    records = [record for record in report.media if record.row == row]
    assert len(records) == len(wanted.items)
    for record, item in zip(records, wanted.items, strict=True):
        assert record.modality == item.modality
        assert record.tokens == len(item.slots)
        for kept, layer in ((record.entered_indices, wanted.work[0]), (record.left_indices, wanted.work[-1])):
            assert item.slots[kept].tolist() == layer.alive[torch.isin(layer.alive, item.slots)].tolist()
    assert (done.logits[row] - wanted.logits).abs().max() < CLOSE


def census(model: nn.Module) -> dict[str, Any]:
    """List everything about a model that a plan might leave behind."""
    stock: dict[str, Any] = {"state": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}}
    for name, module in model.named_modules():
        own = vars(module)
        stock[name] = (
            type(module),
            sorted(own),
            {key: list(value.items()) for key, value in own.items() if "hooks" in key and isinstance(value, dict)},
            {key: id(value) for key, value in own.items() if callable(value)},
            module.training,
        )
        config = own.get("config")
        if config is not None:
            stock[name + ".config"] = (id(config), config._attn_implementation, sorted(vars(config)))
    return stock


def registries() -> tuple[dict[str, Any], ...]:
    """Copy the registries of transformers that hold for all models."""
    return tuple(
        dict(table)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        for table in (registry._global_mapping, registry._local_mapping)
    )
