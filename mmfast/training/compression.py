"""Teaching a model to read its images through compression tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmfast.adapters import add_compression_tokens
from mmfast.training.conversations import Source
from mmfast.training.objective import IGNORED, Loss
from mmfast.training.settings import is_number
from mmfast.training.supervised import Supervised, Taught, Trained, answer_loss, encode


@dataclass(frozen=True)
class Paired(Taught):
    """A batch of conversations, and the same without compression tokens.

    Attributes:
        plain: what the teacher sees; None where there is no teacher.
    """

    plain: Taught | None = None


class Compression(Supervised):
    """Answers to questions about images that only compression tokens have seen.

    The model gets the token ``<voco>`` (see :func:`mmfast.adapters.add_compression_tokens`) and learns under the plan
    ``voco()``. What it exports is loaded by ``from_pretrained`` and knows its compression tokens.

    Paper: "VoCo-LLaMA: Towards Vision Compression with Large Language Models" (arXiv 2406.12275). Its code learns by
    cross-entropy alone; the distillation is ours.

    Args:
        model: a vision-language model.
        processor: its processor.
        source: what it is taught.
        tokens: compression tokens behind each image; of several numbers one is drawn for each step, and the largest
            is what the exported processor writes. A number named several times is drawn so much more often.
        hide_prefix: what they hide beside the image, see the method ``voco``.
        distinct: each token has a row of its own in the vocabulary, see
            :func:`mmfast.adapters.add_compression_tokens`; otherwise all are copies of one.
        loss: ``"ce"`` for cross-entropy on the answers; ``"ce+kd"`` adds the divergence from what the model, as it was
            before this training, foretells where it sees the image.
        kd_weight: factor of that divergence.
        temperature: by which the logits of both are divided for it; its square is a further factor.
        part_weight: factor of a loss (ours) that asks each token to look at its own part of the image, see
            :func:`mmfast.token_pruning.compression_base.own_parts`: the mean of ``-log(attention to the part)``. To
            learn to differ can take tokens longer than all the rest, without it.
        part_share: share of the training in which it is asked for.
        part_layers: in the first so many layers.
        trained: as for :class:`Supervised`.

    Raises:
        ValueError: for another loss or number, or if nothing is left to train.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Source,
        *,
        tokens: int | Sequence[int] = 4,
        hide_prefix: Literal["all", "visual"] = "all",
        distinct: bool = False,
        loss: Literal["ce", "ce+kd"] = "ce",
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        part_weight: float = 0.0,
        part_share: float = 0.7,
        part_layers: int = 3,
        trained: Trained = "language+projector",
    ) -> None:
        counts = tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)
        if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"tokens={tokens!r} must be an int of at least 1, or several")
        if not isinstance(distinct, bool):
            raise ValueError(f"distinct={distinct!r} must be true or false")
        if loss not in ("ce", "ce+kd"):
            raise ValueError(f"loss={loss!r} must be 'ce' or 'ce+kd'")
        for name, value in (("kd_weight", kd_weight), ("temperature", temperature)):
            if not is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
        if not is_number(part_weight) or not 0 <= part_weight < float("inf"):
            raise ValueError(f"part_weight={part_weight!r} must be a finite number of at least 0")
        if not is_number(part_share) or not 0 <= part_share <= 1:
            raise ValueError(f"part_share={part_share!r} must be a number from 0 to 1")
        if isinstance(part_layers, bool) or not isinstance(part_layers, int) or part_layers < 1:
            raise ValueError(f"part_layers={part_layers!r} must be an int of at least 1")
        # Before the token is added: the teacher does not know it, and is not shown it.
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if loss == "ce+kd" else None
        add_compression_tokens(model, processor, max(counts), hide_prefix, distinct=distinct)
        super().__init__(model, processor, source, plan="voco()", trained=trained)
        self.counts, self.kd_weight, self.temperature = counts, kd_weight, temperature
        self.part_weight, self.part_share, self.part_layers = part_weight, part_share, part_layers
        self.teacher = teacher

    def train(self, mode: bool = True) -> Compression:
        """Set the mode of what learns; the teacher stays as it is."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def batch(self, step: int, part: int, parts: int, size: int) -> Paired:
        """Take the conversations of a step: for the model, and without compression tokens for its teacher."""
        first = (step * parts + part) * size
        conversations = [self.source.at(first + i) for i in range(size)]
        count = int(np.random.default_rng([self.source.seed, step]).choice(self.counts))
        shown = encode(self.processor, conversations, num_compressed=count)
        plain = None if self.teacher is None else encode(self.processor, conversations, num_compressed=0)
        return Paired(shown.inputs, shown.labels, shown.where, plain)

    def forward(self, batch: Taught, done: float) -> Loss:
        """Compute the loss of the answers, how far they are from the teacher's, and who looks at what."""
        logits, labels, parts = self._learned(batch, done)
        loss, right = answer_loss(logits, labels)
        figures = {"tokens_right": right, "ce": float(loss.detach())}
        if parts is not None:
            loss = loss + self.part_weight * parts
            figures["parts"] = float(parts.detach())
        if self.teacher is None or not isinstance(batch, Paired) or batch.plain is None:
            return Loss(loss, figures)
        with torch.no_grad():
            inputs, own = batch.plain.beside(self.teacher)
            wanted = self.teacher(**inputs, use_cache=False).logits
        distance = distillation(_answers(logits, labels), _answers(wanted, own), self.temperature)
        return Loss(loss + self.kd_weight * distance, {**figures, "kd": float(distance.detach())})

    def _learned(self, batch: Taught, done: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return logits and labels of a batch, and how little the tokens look at their own parts, if that is asked."""
        inputs, labels = batch.beside(self.model)
        if self.fast is None or not self.part_weight or done >= self.part_share:
            return self.model(**inputs, use_cache=False).logits, labels, None
        with self.fast.training(labels != IGNORED, done=done, parts=self.part_layers) as lesson:
            logits = self.model(**inputs, use_cache=False).logits
        masses = [mass.flatten() for mass in lesson.noted("own_part")]
        return logits, labels, -(torch.cat(masses) + 1e-4).log().mean() if masses else None


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence of a student from its teacher, times the square of the temperature.

    Args:
        student: logits ``[n, V]``.
        teacher: logits ``[n, W]``; what the vocabularies have in common, the first entries, is compared.
        temperature: divides both.

    Example:
        >>> distillation(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])).item()
        0.0
    """
    width = min(student.shape[1], teacher.shape[1])
    given, wanted = (logits[:, :width].float() / temperature for logits in (student, teacher))
    divergence = functional.kl_div(
        given.log_softmax(dim=-1), wanted.log_softmax(dim=-1), log_target=True, reduction="batchmean"
    )
    return temperature**2 * divergence


def _answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rows of logits ``[B, S, V]`` that foretell answers, ``[n, V]``."""
    return logits[:, :-1][labels[:, 1:] != IGNORED]
