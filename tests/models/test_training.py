"""Gradients under a plan equal those of a model in which the dropped tokens are masked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

import mmfast
from support.cases import case_id
from support.checks import CLOSE, FAR
from support.families import FAMILIES, Batch, Family
from support.reference import expected

BEFORE, INSIDE = 'divprune(keep=0.4, positions="keep")', "fastv(keep=0.4)"
BOTH = 'uniform(keep=0.6, positions="keep") + pyramiddrop(keep=0.25)'
LABELS = 3
OLD = "__call__" in vars(GradientCheckpointingLayer)

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)


@contextmanager
def training(model: Any) -> Iterator[Any]:
    """Train for a while; the models are shared."""
    model.train()
    try:
        yield model
    finally:
        switch_checkpointing(model, on=False)
        model.zero_grad(set_to_none=True)
        model.eval()


def switch_checkpointing(model: Any, *, on: bool) -> None:
    """Newer releases of transformers have another name for it and warn about the old one."""
    word = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{word}", None)
    (switch or getattr(model, f"gradient_checkpointing_{word}"))()


def prompts(family: Family) -> Batch:
    return family.batch([2, family.image(0, 1), 5], [3, family.image(family.sizes - 1, 2), 4], [8])


def labelled(batch: Batch) -> dict[str, Tensor]:
    """Ask for the last tokens of each row, whose predecessors are text too."""
    inputs = batch.inputs
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -LABELS:] = inputs["input_ids"][:, -LABELS:]
    return {**inputs, "labels": labels}


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@contextmanager
def hidden(model: Any, alive: list[Tensor], length: int) -> Iterator[None]:
    """Hide the columns of dropped tokens in each layer of an untouched model."""

    def hide(columns: Tensor) -> Any:
        gone = torch.ones(length, dtype=torch.bool)
        gone[columns] = False

        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": mask.masked_fill(gone, torch.finfo(mask.dtype).min)}

        return before

    layers = model.get_decoder().layers
    handles = [
        layer.register_forward_pre_hook(hide(columns), with_kwargs=True)
        for layer, columns in zip(layers, alive, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_step(batch: Batch, plan: str) -> tuple[float, dict[str, Tensor]]:
    """Average over the rows, each alone and at full length."""
    total, sums = 0.0, dict[str, Tensor]()
    with training(batch.family.model("eager")) as model:
        for row in range(len(batch)):
            own = batch.alone(row)
            wanted = expected(own, plan)
            with hidden(model, wanted.alive, len(own.ids[0])):
                loss, gradients = step(model, labelled(own))
            total += loss / len(batch)
            for name, gradient in gradients.items():
                sums[name] = sums.get(name, 0.0) + gradient / len(batch)
    return total, sums


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    zeros = {name: torch.zeros_like(gradient) for name, gradient in {**mine, **theirs}.items()}
    mine, theirs = {**zeros, **mine}, {**zeros, **theirs}
    return max(float((mine[name] - theirs[name]).abs().max()) for name in zeros)


@every_family
@pytest.mark.parametrize("plan", [BEFORE, INSIDE, BOTH])
def test_loss_and_gradients_equal_the_masked_reference(family: Family, plan: str) -> None:
    batch = prompts(family)
    with training(family.model()) as model:
        full_loss, full = step(model, labelled(batch))
        with mmfast.accelerate(model, plan):
            loss, gradients = step(model, labelled(batch))
    wanted_loss, wanted = masked_step(batch, plan)
    assert abs(loss - wanted_loss) < CLOSE
    assert largest_difference(gradients, wanted) < CLOSE
    # What is compared is neither nothing nor what an untouched model gives; the vision tower learns too.
    assert abs(loss - full_loss) > 10 * CLOSE
    assert largest_difference(gradients, full) > FAR / 10
    assert max(float(gradient.abs().max()) for name, gradient in gradients.items() if in_tower(name)) > FAR / 10


def in_tower(name: str) -> bool:
    return "tower" in name or "vis" in name


@every_family
def test_merged_tokens_pass_gradients_on(family: Family) -> None:
    batch = prompts(family)
    with training(family.model()) as model, mmfast.accelerate(model, "pool2d(keep=0.3)"):
        _, gradients = step(model, labelled(batch))
        weight = next(
            weight
            for name, weight in model.named_parameters()
            if in_tower(name) and weight.ndim > 1 and weight.grad is not None
        )
        place = int(weight.grad.abs().argmax())
        gradient = float(weight.grad.flatten()[place])
        slope = []
        with torch.no_grad():
            for nudge in (1e-2, -2e-2):
                weight.flatten()[place] += nudge
                slope.append(model(**labelled(batch), use_cache=False).loss.item())
            weight.flatten()[place] += 1e-2
    assert all(bool(own.isfinite().all()) for own in gradients.values())
    assert abs((slope[0] - slope[1]) / 2e-2 - gradient) < 0.05 * abs(gradient) + 1e-4


@every_family
@pytest.mark.parametrize("plan", [BEFORE, INSIDE, BOTH])
def test_gradient_checkpointing(family: Family, plan: str) -> None:
    batch = prompts(family)
    with training(family.model()) as model, mmfast.accelerate(model, plan):
        loss, gradients = step(model, labelled(batch))
        switch_checkpointing(model, on=True)
        if OLD and (plan != BEFORE or family.name == "qwen3_vl"):
            with pytest.raises(ValueError, match="with gradient checkpointing needs a newer transformers"):
                step(model, labelled(batch))
            return
        again, checkpointed = step(model, labelled(batch))
    assert abs(loss - again) < 1e-6
    assert largest_difference(gradients, checkpointed) < 1e-6


@every_family
def test_labels_after_dropped_tokens_are_predicted_by_the_last_survivor(family: Family) -> None:
    """The one difference to a masked model, on purpose: the shortened prompt is a shorter prompt."""
    batch = family.batch([3, family.image(), 4])
    inputs = batch.inputs
    plan = 'uniform(keep=2, positions="keep")'
    wanted = expected(batch, plan)
    last = wanted.items[-1].slots[-1]
    assert last not in wanted.alive[0]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, last + 1] = inputs["input_ids"][0, last + 1]
    model = family.model()
    with mmfast.accelerate(model, plan), torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    survivor = int((wanted.alive[0] < last).sum()) - 1
    correct = -wanted.inner[survivor].log_softmax(dim=-1)[inputs["input_ids"][0, last + 1]]
    assert abs(float(loss - correct)) < CLOSE
