"""Teaching a draft head to foretell what a model is going to say, from answers the model wrote itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mmfast.speculative.heads.base import HeadConfig
from mmfast.speculative.heads.feature import FeatureHead
from mmfast.training.conversations import Source, order
from mmfast.training.draft_heads.answers import Answer, Answers, noisy, seeded
from mmfast.training.draft_heads.evaluation import check_enough, evaluate, held_out
from mmfast.training.draft_heads.options import HeadOptions
from mmfast.training.draft_heads.teaching import KINDS, output_of
from mmfast.training.objective import Loss, Objective


class DraftHead(Objective):
    """A head that drafts for a model; the model itself is never changed.

    The model first answers the questions of the data; what it wrote is kept in the folder of the run, so that a run
    that goes on does not ask again. The head then learns from the model's hidden states and laws. What is exported,
    ``model.safetensors`` as float16 and ``config.json``, is what ``accelerate(model, "msd(path='FOLDER')")`` reads.

    Args:
        model: a vision-language model whose text positions count tokens, as those of LLaVA models do.
        processor: its processor.
        source: questions; the answers in it are not read.
        options: what head, and how it learns.

    Raises:
        ValueError: if positions of the model have several dimensions, or a file has too few conversations.

    Example:
        >>> import mmfast
        >>> from mmfast.training.conversations import WorldSource
        >>> model, processor = mmfast.load_default(dtype="float32")
        >>> objective = DraftHead(model, processor, WorldSource(), HeadOptions("medusa", prompts=4, held_out=0))
        >>> sorted({name.split(".")[0] for name, weight in objective.named_parameters() if weight.requires_grad})
        ['head']
    """

    def __init__(self, model: Any, processor: Any, source: Source, options: HeadOptions) -> None:
        super().__init__()
        check_enough(source, options)
        self.answers = Answers(model, processor, source, options)
        self.model = model.eval().requires_grad_(False)
        self.processor, self.source, self.options = processor, source, options
        self.head = new_head(model, options)
        self._pools: tuple[list[int], list[int]] = [], []

    def train(self, mode: bool = True) -> DraftHead:
        """Set the mode of the head; the model stays as it is."""
        super().train(mode)
        self.model.eval()
        return self

    def begin(self, folder: Path, part: int, parts: int) -> None:
        """Let the model write the answers that the folder lacks."""
        self.answers.collect(folder, part, parts)

    def batch(self, step: int, part: int, parts: int, size: int) -> list[Answer]:
        """Take the answers of a step, with noise on what the head reads."""
        first = (step * parts + part) * size
        chance = torch.Generator().manual_seed(self.options.seed * 1_000_003 + first)
        return [noisy(self.answers.at(self._number(first + i)), self.options.noise, chance) for i in range(size)]

    def forward(self, batch: list[Answer], done: float) -> Loss:
        """Compute the mean loss, and the share of tokens that the model and the head find likeliest alike."""
        output, kind = output_of(self.model), KINDS[self.options.method]
        place = next(self.head.parameters()).device
        losses, right, tokens = [], 0, 0
        for answer in batch:
            answer = answer.to(place)
            lesson = kind.teach(self.head, answer, output, self.options, done)
            losses.append(lesson.loss)
            found = lesson.log_q.detach().argmax(dim=-1)
            right += int((found == answer.laws[: len(found)].argmax(dim=-1)).sum())
            tokens += len(found)
        return Loss(torch.stack(losses).mean(), {"tokens_right": right / tokens})

    def describe(self, batch: list[Answer]) -> str:
        """Name the questions."""
        return ", ".join(answer.where for answer in batch)

    def export(self, folder: Path) -> None:
        """Write weights as float16, and sizes and options as ``config.json``."""
        tensors = {name: value.half().contiguous().cpu() for name, value in self.head.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        data = {**sizes(self.model), "method": self.options.method, "trained_with": asdict(self.options)}
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Try the exported head on held-out questions, see :func:`mmfast.training.draft_heads.evaluation.evaluate`."""
        asked = held_out(self.source, self.options)
        return evaluate(self.model, self.processor, asked, self.options, folder)

    def _number(self, place: int) -> int:
        """Return which answer stands at a place of the endless row of examples."""
        seed, epochs = self.options.seed, self.options.two_stage_epochs
        if not epochs:
            turn, at = divmod(place, len(self.answers))
            return int(order(seed, turn, len(self.answers))[at])
        text, seen = self._divided()
        turn, at = divmod(place, min(len(text), len(seen)))
        share = share_of_pictures(turn + 1, epochs)
        pool = seen if np.random.default_rng([seed, 1, place]).random() < share else text
        return pool[int(order(seed, turn, len(pool))[at])]

    def _divided(self) -> tuple[list[int], list[int]]:
        """Return the answers without pictures, and those with."""
        if not any(self._pools):
            for number in range(len(self.answers)):
                self._pools[self.answers.sees(number)].append(number)
        if not all(self._pools):
            raise ValueError(
                f"two_stage_epochs={self.options.two_stage_epochs} needs questions with pictures and without; "
                f"of {len(self.answers)} there are {len(self._pools[1])} with; give other data, or leave it out"
            )
        return self._pools


def share_of_pictures(epoch: int, epochs: int) -> float:
    """Return how likely an example of an epoch has a picture, in MSD's two stages (arXiv 2505.14260).

    Args:
        epoch: which one, from 1.
        epochs: E, the length of both stages together.

    Example:
        >>> [share_of_pictures(epoch, 4) for epoch in (1, 2, 3, 4, 5)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    return min(1.0, max(0.0, (epoch - epochs / 2) / epochs * 2))


def sizes(model: Any) -> dict[str, Any]:
    """Return the ``config.json`` of a head whose layer is one of the model's own."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": model.get_output_embeddings().weight.shape[0],
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "hidden_act": "silu",
    }


def new_head(model: Any, options: HeadOptions) -> nn.Module:
    """Make an untrained head; a decoder layer begins as the model's last one, ``fc`` as the mean of its two inputs."""
    data = sizes(model)
    width = data["hidden_size"]
    with seeded(options.seed):
        head = KINDS[options.method].make(HeadConfig.read(data, width), options)
    if isinstance(head, FeatureHead):
        last = model.get_decoder().layers[-1].state_dict()
        own = head.layers[0].state_dict()
        head.layers[0].load_state_dict({name: last[name] if name in last else own[name] for name in own})
        half = torch.eye(width) / 2
        with torch.no_grad():
            head.fc.weight.copy_(torch.cat([half, half], dim=1))
            head.fc.bias.zero_()
    placed: nn.Module = head.to(model.device)
    return placed
