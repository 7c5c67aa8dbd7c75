"""Teaching the learned parts of a plan's methods what to keep, with the model around them or without."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mmfast
from mmfast.training.conversations import Source
from mmfast.training.objective import Loss
from mmfast.training.settings import is_number
from mmfast.training.supervised import Supervised, Taught, Trained, save_part


class Gates(Supervised):
    """Cross-entropy on answers while learned parts decide in their training form, and what their papers add to it.

    What is learned is exported as ``<method>.safetensors``, which the method's ``weights=`` loads.

    Args:
        model: a vision-language model.
        processor: its processor.
        source: what it is taught.
        plan: with a method that has learned parts, such as ``"dynamic_llava(keep=0.2)"``; its ``weights=`` says where
            they begin.
        trained: what of the model learns along: as for :class:`~mmfast.training.supervised.Supervised`, ``"plan"`` for
            nothing.
        model_rate: learning rate of the model's own weights, as a share of that of the learned parts; AdamW only.

    Raises:
        ValueError: if nothing of the plan is learned this way, or ``model_rate`` is not above 0.

    Example:
        >>> from mmfast.training.conversations import WorldSource
        >>> model, processor = mmfast.load_default(dtype="float32")
        >>> gates = Gates(model, processor, WorldSource(families=["color"]), plan="p_mod()")
        >>> sorted(name for name, weight in gates.named_parameters() if weight.requires_grad)[0]
        'learned.p_mod.layers.2.bias'
        >>> gates.fast.remove()
    """

    fast: mmfast.Accelerated
    learned: nn.ModuleDict

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Source,
        *,
        plan: str,
        trained: Trained = "plan",
        model_rate: float = 1.0,
    ) -> None:
        if not is_number(model_rate) or not model_rate > 0:
            raise ValueError(f"model_rate={model_rate!r} must be above 0; trained='plan' leaves the model as it is")
        super().__init__(model, processor, source, plan=plan, trained=trained)
        self.model_rate = model_rate
        self.learned = self.fast.learned()
        if not len(self.learned):
            self.fast.remove()
            raise ValueError(
                f"plan={plan!r} has no learned parts to train; name one of dynamic_llava, p_mod, gamma_mod or dpn"
            )
        self.learned.requires_grad_(True)

    def forward(self, batch: Taught, done: float) -> Loss:
        """Compute the loss of the answers and of the decisions."""
        loss = super().forward(batch, done)
        if loss.total.requires_grad:
            return loss
        # Where no row has a picture nothing is decided: the step changes nothing.
        nothing = sum((weight.sum() * 0.0 for weight in self.learned.parameters()), loss.total)
        return Loss(nothing, loss.figures)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Let the model learn at its own rate."""
        own = {id(weight) for weight in self.learned.parameters()}
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        parts = [weight for weight in trained if id(weight) in own]
        model = [weight for weight in trained if id(weight) not in own]
        return [(parts, 1.0), *([(model, self.model_rate)] if model else [])]

    def export(self, folder: Path) -> None:
        """Write the learned parts, and the model if it learned too."""
        for name, part in self.learned.items():
            save_part(part, folder / f"{name}.safetensors")
        if any(weight.requires_grad for weight in self.model.parameters()):
            super().export(folder)
        else:
            self.fast.remove()

    def _lesson(self, answers: Tensor, done: float) -> AbstractContextManager[Any]:
        return self.fast.training(answers, gates=True, done=done)
