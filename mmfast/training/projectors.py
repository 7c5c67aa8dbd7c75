"""Teaching learned projectors and compressors, and models that read images at several counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import mmfast
from mmfast.training.conversations import Source
from mmfast.training.objective import IGNORED, Loss
from mmfast.training.settings import is_number
from mmfast.training.supervised import Supervised, Taught, Trained, answer_loss, encode, save_part

# Conversations among which a picture is looked for; reading them takes time.
_LOOKED_THROUGH = 200


class Projectors(Supervised):
    """Cross-entropy on answers about images that went through a method before the language model.

    With one count this teaches the method's module, the model, or both. With several it teaches them to serve at any:
    the module is the same at every count. What is learned of the method is exported as ``<method>.safetensors``, which
    its ``weights=`` loads.

    Papers: "Matryoshka Multimodal Models" (arXiv 2405.17430: the mean of the losses at all counts), "Matryoshka Query
    Transformer for Large Vision-Language Models" (arXiv 2405.19315: one count drawn for each step).

    Args:
        model: a vision-language model.
        processor: its processor.
        source: what it is taught.
        method: a method before the language model with its options but ``keep``, such as ``"mqt(queries=256)"``.
        keep: tokens left of each image; of several counts, ``per_step`` says which a step takes. A count that is not
            below the number of tokens leaves the image as it is.
        per_step: ``"all"``: the loss is the mean over all counts; ``"one"``: one is drawn for each step.
        trained: what of the model learns along: as for :class:`~mmfast.training.supervised.Supervised`, ``"plan"`` for
            nothing.
        model_rate: learning rate of the model's own weights, as a share of that of the method; AdamW only.

    Raises:
        ValueError: for another kind of method, a count that is none, or if nothing is left to train.

    Example:
        >>> from mmfast.training.conversations import WorldSource
        >>> model, processor = mmfast.load_default(dtype="float32")
        >>> taught = Projectors(model, processor, WorldSource(families=["color"]), method="pool_adapter()", keep=16)
        >>> sorted(name for name, weight in taught.named_parameters() if weight.requires_grad)[0]
        'learned.0.mlp.0.bias'
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Source,
        *,
        method: str,
        keep: int | float | Sequence[int | float],
        per_step: Literal["all", "one"] = "all",
        trained: Trained = "plan",
        model_rate: float = 1.0,
    ) -> None:
        if per_step not in ("all", "one"):
            raise ValueError(f"per_step={per_step!r} must be 'all' or 'one'")
        if not is_number(model_rate) or not model_rate > 0:
            raise ValueError(f"model_rate={model_rate!r} must be above 0; trained='plan' leaves the model as it is")
        super().__init__(model, processor, source, trained=trained)
        self.per_step, self.model_rate = per_step, model_rate
        self.methods = _at_each(method, keep)
        self.learned = nn.ModuleList(self._parts())
        self.learned.requires_grad_(True)
        if not any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(f"method={method!r} has nothing to learn; say with trained= what of the model learns")

    def batch(self, step: int, part: int, parts: int, size: int) -> tuple[Taught, tuple[Any, ...]]:  # type: ignore[override]
        """Take the conversations of a step and the method at the counts it is taught at."""
        chosen = tuple(self.methods)
        if self.per_step == "one":
            chosen = (self.methods[int(np.random.default_rng([self.source.seed, step]).integers(len(self.methods)))],)
        return super().batch(step, part, parts, size), chosen

    def forward(self, batch: tuple[Taught, tuple[Any, ...]], done: float) -> Loss:  # type: ignore[override]
        """Compute the mean of the losses of the answers."""
        shown, chosen = batch
        losses, figures = [], {}
        for method in chosen:
            loss, right = self._answers(shown, method, done)
            losses.append(loss)
            figures[f"tokens_right_{method.keep}"] = right
        total = torch.stack(losses).mean()
        # At a count that leaves the images as they are, nothing of the method is asked: such a step teaches the model.
        unused = sum((weight.sum() * 0.0 for weight in self.learned.parameters()), total)
        return Loss(unused, figures)

    def weight(self, batch: tuple[Taught, tuple[Any, ...]]) -> float:  # type: ignore[override]
        """Count the tokens of the answers, over which the loss is the mean."""
        return super().weight(batch[0])

    def describe(self, batch: tuple[Taught, tuple[Any, ...]]) -> str:  # type: ignore[override]
        """Name the conversations."""
        return super().describe(batch[0])

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Let the model learn at its own rate."""
        parts = list(self.learned.parameters())
        model = [weight for weight in self.model.parameters() if weight.requires_grad]
        rates = ((parts, 1.0), (model, self.model_rate if parts else 1.0))
        return [(weights, rate) for weights, rate in rates if weights]

    def export(self, folder: Path) -> None:
        """Write what was learned of the method, and the model if it learned too."""
        for part in self.learned:
            save_part(part, folder / f"{self.methods[0].name}.safetensors")
        if any(weight.requires_grad for weight in self.model.parameters()):
            super().export(folder)

    def _answers(self, shown: Taught, method: Any, done: float) -> tuple[Tensor, float]:
        """Return the loss of the answers with a method at work, and the share of their tokens foretold."""
        inputs, labels = shown.beside(self.model)
        with mmfast.accelerate(self.model, [method]) as fast, fast.training(labels != IGNORED, done=done):
            logits = self.model(**inputs, use_cache=False).logits
        return answer_loss(logits, labels)

    def _parts(self) -> list[nn.Module]:
        """Build the learned part of the method, whose sizes show when it first meets an image of this model."""
        first = self.methods[0]
        if not hasattr(first, "trained_parts"):
            return []
        talks = (self.source.at(number) for number in range(_LOOKED_THROUGH))
        pictured = next((talk for talk in talks if talk.images or talk.frames), None)
        if pictured is None:
            raise ValueError(
                f"the data hold no pictures in their first {_LOOKED_THROUGH} conversations; {first.name!r} learns from "
                "pictures"
            )
        shown = encode(self.processor, [pictured])
        with torch.no_grad():
            for method in self.methods:
                self._answers(shown, method, 0.0)
        found: list[nn.Module] = first.trained_parts()
        if len(found) != 1:
            what = "never used" if not found else "another one for each count, or for each size of image"
            raise ValueError(
                f"keep={[method.keep for method in self.methods]}: the module of {first.name!r} is {what}; give one "
                "count below the number of visual tokens of the data, or a method whose module serves at any"
            )
        return found


def _at_each(text: str, keep: int | float | Sequence[int | float]) -> list[Any]:
    """Read a method and return it at each count, working with one module."""
    methods: list[Any] = list(mmfast.Plan.parse(text).methods)
    if len(methods) != 1 or methods[0].stage != "before_llm":
        raise ValueError(f"method={text!r} must name one method before the language model, such as 'm3_pool()'")
    counts = [keep] if isinstance(keep, int | float) else list(keep)
    if not counts:
        raise ValueError("keep=[] must name at least one count")
    at_count = getattr(methods[0], "at", None) or (lambda count: replace(methods[0], keep=count))
    return [at_count(count) for count in counts]
