"""Fit a plan to a model: methods try out their settings on sample prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmfast.accelerated import accelerate
from mmfast.budget import LanguageShape
from mmfast.plan import Plan, PlanLike
from mmfast.registry import methods
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.calibrating import Calibrated, Look, Observer


def calibrate(
    model: nn.Module,
    plan: PlanLike,
    samples: Iterable[Mapping[str, Any]],
    *,
    keep: int | float | None = None,
    path: str | Path | None = None,
) -> Plan:
    """Fit the methods of a plan to a model: which layers to drop at, to freeze, or how much to delete in each.

    Every method that can be calibrated tries out settings on the samples, beside the other methods of the plan; the
    others stay as they are. The model is left as it was. On a terminal a progress bar counts the prompts run.

    Args:
        model: an unmodified Hugging Face vision-language model with no plan at work on it.
        plan: the plan, in any form that :func:`~mmfast.accelerate` takes.
        samples: what the processor returned for each sample prompt, with an image or video each. Some twenty prompts
            of the kind that the model will get are enough for most methods.
        keep: budget of the method that is calibrated, where calibration does not find it.
        path: where to write the plan, as TOML or JSON by its ending.

    Returns:
        The calibrated plan.

    Raises:
        TypeError: if the model or the plan is of the wrong kind.
        ValueError: if there are no samples, nothing in the plan can be calibrated, or ``keep`` does not go with it.

    Example:
        >>> import torch
        >>> import mmfast
        >>> model, processor = mmfast.load_default()
        >>> images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        >>> samples = [processor(images=image, text="<image> what is this?", return_tensors="pt") for image in images]
        >>> calibrate(model, "vtw(tolerance=1e9)", samples).methods[0].layer
        1
    """
    given = Plan.of(plan)
    able = sum(isinstance(method, Calibrated) for method in given.methods)
    if not able:
        names = [info.name for info in methods() if hasattr(info.method, "calibrated")]
        raise ValueError(f"nothing in plan {given.to_text()!r} can be calibrated; these can: {', '.join(names)}")
    if keep is not None and able > 1:
        raise ValueError(f"keep={keep} is the budget of one method, but {able} of plan {given.to_text()!r} are fitted")
    prompts = list(samples)
    if not prompts:
        raise ValueError("samples is empty; pass what the processor returned for at least one prompt")
    if model.training:
        raise ValueError("the model is in training mode, in which its answers may vary; call model.eval() first")
    fitted = list(given.methods)
    for place, method in enumerate(given.methods):
        if isinstance(method, Calibrated):
            others = (*fitted[:place], *fitted[place + 1 :])
            with tqdm(desc=f"calibrating {method.name}", unit=" prompts", disable=None) as progress:
                fitted[place] = method.calibrated(_Bench(model, others, prompts, progress), keep)
    found = Plan(tuple(fitted))
    if path is not None:
        found.save(Path(path))
    return found


class _Bench:
    """The model, the other methods of the plan, and the sample prompts."""

    def __init__(
        self, model: nn.Module, others: tuple[Method, ...], samples: list[Mapping[str, Any]], progress: Any
    ) -> None:
        self._model, self._others, self._samples, self._progress = model, others, samples, progress
        self._without: list[Tensor] | None = None
        with accelerate(model, Plan(others)) as fast:
            self.shape: LanguageShape = fast.report().shape

    def divergence(self, method: Method) -> float:
        """Run all prompts with and without a method."""
        if self._without is None:
            self._without = self._run(Plan(self._others))
        both = zip(self._without, self._run(Plan((*self._others, method))), strict=True)
        each = [(before.exp() * (before - after)).sum(dim=-1) for before, after in both]
        return float(torch.cat(each).mean())

    def watch(self, look: Look) -> None:
        """Show the tokens of all prompts at every layer but the first."""
        self._run(Plan((*self._others, Observer(look=look))))

    def _run(self, plan: Plan) -> list[Tensor]:
        """Run all prompts; return the logarithms of the next token's probabilities, float32 ``[B, V]`` each."""
        device = next(self._model.parameters()).device
        found = []
        with torch.inference_mode(), accelerate(self._model, plan):
            for sample in self._samples:
                inputs = {
                    name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample.items()
                }
                logits: Tensor = self._model(**inputs, use_cache=False).logits
                last = _last_places(inputs, logits.shape[1]).to(logits.device)
                rows = torch.arange(logits.shape[0], device=logits.device)
                found.append(logits[rows, last].float().log_softmax(dim=-1).cpu())
                self._progress.update(logits.shape[0])
        return found


def _last_places(inputs: Mapping[str, Any], length: int) -> Tensor:
    """Return the place of the last real token of each row, int64 ``[B]``."""
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None:
        return torch.full((inputs["input_ids"].shape[0],), length - 1)
    return mask.flip(dims=[1]).long().argmax(dim=1).mul(-1).add(length - 1)
