"""How each draft head is made and what it learns from one answer; all of them share the model's output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.speculative.heads.base import HeadConfig
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead
from mmfast.speculative.heads.static import HydraHeads, LatentHead, MedusaHeads
from mmfast.training import losses
from mmfast.training.draft_heads.answers import Answer
from mmfast.training.draft_heads.options import HeadOptions

Output = Callable[[Tensor], Tensor]
"""Hidden states ``[n, D]`` -> the logarithms of their laws, float32 ``[n, V]``."""


@dataclass(frozen=True)
class Lesson:
    """What a head learns from one answer.

    Attributes:
        loss: scalar.
        log_q: ``[n, V]``, what the head makes of the first tokens of the answer from the model's own states.
    """

    loss: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class Method:
    """A kind of head.

    Attributes:
        make: from the sizes of a decoder layer.
        teach: head, answer, output layer, options and share of the steps taken -> what is learned.
    """

    make: Callable[[HeadConfig, HeadOptions], Any]
    teach: Callable[[Any, Answer, Output, HeadOptions, float], Lesson]


def output_of(model: Any) -> Output:
    """Return what turns hidden states into laws: the output layer of the model, in whatever type it computes."""
    layer: nn.Module = model.get_output_embeddings()

    def laws(features: Tensor) -> Tensor:
        logits: Tensor = layer(features.to(layer.weight.dtype))  # type: ignore[arg-type]
        return logits.float().log_softmax(dim=-1)

    return laws


def _foretold(head: FeatureHead | LatentHead | HydraHeads, answer: Answer) -> Tensor:
    """Return outputs of the slots from that of the first token of the answer to the last that foretells: ``[n, D]``."""
    slots = head.prompt(answer.text)
    output = head.run(slots.inputs, slots.positions)
    return output[slots.places >= answer.start - 1]


def _msd(head: FeatureHead, answer: Answer, output: Output, options: HeadOptions, done: float) -> Lesson:
    passes = list(_unrolled(head, answer, output, options.unroll))
    parts = [losses.eagle1(features, answer.wanted, answer.laws, log_q) for features, log_q in passes]
    return Lesson(torch.stack(parts).mean(), passes[0][1])


def _vispec(head: CompressedHead, answer: Answer, output: Output, options: HeadOptions, done: float) -> Lesson:
    """Stage 1, EAGLE's loss, for half of the steps; then stage 2."""
    if done < 0.5:
        return _msd(head, answer, output, replace(options, unroll=0), done)
    passes = list(_unrolled(head, answer, output, options.unroll))
    parts = [losses.vispec(answer.laws, log_q) for _, log_q in passes]
    return Lesson(torch.stack(parts).mean(), passes[0][1])


def _unrolled(head: FeatureHead, answer: Answer, output: Output, unroll: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield foretold states and laws of the teacher-forced pass, then of passes that read the head's own states."""
    for _ in range(unroll + 1):
        features = _foretold(head, answer)
        yield features, output(features)
        # The slot before the answer always reads a true state: nothing foretold it.
        hidden = torch.cat([answer.text.hidden[: answer.start], features.to(answer.text.hidden.dtype)])
        answer = replace(answer, text=replace(answer.text, hidden=hidden))


def _medusa(head: MedusaHeads, answer: Answer, output: Output, options: HeadOptions, done: float) -> Lesson:
    features = head.features(answer.text.hidden[answer.start - 1 : -1])
    return _levels([output(found) for found in features], answer)


def _hydra(head: HydraHeads, answer: Answer, output: Output, options: HeadOptions, done: float) -> Lesson:
    outputs, embeds = _foretold(head, answer), answer.text.embeds[answer.start :]
    count, found = len(outputs), []
    for level in range(min(len(head.hydra_mlp), count)):
        read = [outputs[: count - level], *(embeds[i : i + count - level] for i in range(level + 1))]
        found.append(output(head.features(level, torch.cat(read, dim=-1))))
    return _levels(found, answer)


def _levels(found: Sequence[Tensor], answer: Answer) -> Lesson:
    """Weight the cross-entropy of heads that each look one token further than the one before."""
    parts = []
    for level, log_q in enumerate(found[: len(answer.laws)]):
        laws = answer.laws[level:]
        parts.append(losses.soft_cross_entropy(laws, log_q[: len(laws)]).mean())
    return Lesson(losses.decayed(parts, 0.8, first=1), found[0])


def _flash(head: LatentHead, answer: Answer, output: Output, options: HeadOptions, done: float) -> Lesson:
    foretold = head.foretell(_foretold(head, answer))
    parts, laws = [], []
    for level in range(min(head.steps, len(foretold))):
        features = foretold[: len(foretold) - level, level]
        laws.append(output(features))
        parts.append(losses.eagle1(features, answer.wanted[level:], answer.laws[level:], laws[-1]))
    return Lesson(torch.stack(parts).mean(), laws[0])


KINDS = {
    "msd": Method(lambda config, options: FeatureHead(config), _msd),
    "vispec": Method(lambda config, options: CompressedHead(config, options.num_queries), _vispec),
    "medusa": Method(lambda config, options: MedusaHeads(config.width, options.num_levels), _medusa),
    "hydra": Method(lambda config, options: HydraHeads(config, options.num_levels, blocks=1), _hydra),
    "flash": Method(lambda config, options: LatentHead(config, options.num_queries, options.num_levels), _flash),
}
"""Name of a method -> how its head is made and taught."""
