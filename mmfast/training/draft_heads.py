"""Train a draft head for a model: let the model write, keep its hidden states, teach the head to foretell them.

    python -m mmfast.training.draft_heads --method msd --out heads/msd

trains one for the embedded model in a few minutes on one core. The model itself is never changed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmfast.speculative.base import Prefill
from mmfast.speculative.heads.base import HeadConfig
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead
from mmfast.speculative.heads.static import HydraHeads, LatentHead, MedusaHeads
from mmfast.training import losses

LEVELS = 4
"""Heads of Medusa, and states per slot of FLASH; Hydra's heads are larger, and fewer."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    Attributes:
        method: ``"msd"``, ``"vispec"``, ``"medusa"``, ``"hydra"`` or ``"flash"``.
        prompts: questions the model answers for training.
        new_tokens: tokens it writes to each; the end of an answer is forbidden, so that it writes on.
        sampled: share of the answers that are drawn at ``temperature``; the others are greedy.
        temperature: of those.
        epochs: passes over the answers.
        batch: answers per step.
        rate: peak learning rate; it rises over the first twentieth and falls as a cosine.
        noise: width of the uniform noise on hidden states that enter the head, at 512 tokens.
        unroll: how often the head's own states take the place of the model's in further passes; msd and vispec.
        seed: of everything that is drawn.

    Raises:
        ValueError: for a value that is not legal.
    """

    method: str = "msd"
    prompts: int = 800
    new_tokens: int = 40
    sampled: float = 0.3
    temperature: float = 0.7
    epochs: int = 6
    batch: int = 8
    rate: float = 2e-3
    noise: float = 0.2
    unroll: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _TRAINED:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(_TRAINED)}")
        for name, least in (("prompts", 1), ("new_tokens", 2), ("epochs", 1), ("batch", 1), ("unroll", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least {least}")
        if not 0 <= self.sampled <= 1:
            raise ValueError(f"sampled={self.sampled!r} must be between 0 and 1")


@dataclass(frozen=True)
class Answer:
    """What the model made of a question and its own answer.

    Attributes:
        text: all tokens; the last hidden states of the answer are what a head learns.
        start: place of the first token of the answer.
        laws: float32 ``[n, V]``, what is learned to follow each token of the answer: half the model's law, half what
            is left of it where answers may not end. The one alone says nothing of how an answer goes on where it
            could end, the other never ends it.
    """

    text: Prefill
    start: int
    laws: Tensor

    @property
    def wanted(self) -> Tensor:
        """Hidden states of the answer, ``[n, D]``."""
        return self.text.hidden[self.start :]


def questions(split: str, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield questions with their pictures from the rendered data set that the embedded model knows.

    Args:
        split: ``"train"``, ``"heldout"`` or ``"test"``.
        count: how many.
        seed: which data set.
    """
    from mmfast.eval.datasets.shapes import Shapes

    for record in Shapes(split=split, num_questions=count, seed=seed):
        yield record.question, record.image


@torch.no_grad()
def collect(
    model: Any, processor: Any, asked: Iterable[tuple[str, Any]], recipe: Recipe, *, progress: bool = True
) -> list[Answer]:
    """Let the model answer, and keep what it thought.

    Args:
        model: whose text positions count tokens, as those of LLaVA models do.
        processor: of the model.
        asked: questions, each with a picture or None.
        recipe: how long the answers are, and how many are drawn.
        progress: show a bar.

    Returns:
        The answers, in order.

    Raises:
        ValueError: if positions of the model have several dimensions.
    """
    config = model.config.get_text_config()
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        raise ValueError("positions of this model have several dimensions; this recipe trains heads for one")
    image = getattr(model.config, "image_token_id", -1)
    ends = model.generation_config.eos_token_id
    stop = [ends] if isinstance(ends, int) else list(ends)
    found = []
    with _seeded(recipe.seed):
        for number, (question, picture) in enumerate(tqdm(list(asked), desc="answers", disable=not progress)):
            inputs = _inputs(processor, question, picture).to(model.device)
            drawn = math.floor((number + 1) * recipe.sampled) > math.floor(number * recipe.sampled)
            ids = model.generate(
                **inputs,
                max_new_tokens=recipe.new_tokens,
                do_sample=drawn,
                **({"temperature": recipe.temperature, "top_k": 0} if drawn else {}),
                suppress_tokens=stop,
            )
            start = inputs["input_ids"].shape[1]
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            output = model(**whole, output_hidden_states=True, use_cache=False)
            visual = ids[0] == image
            begins = visual & ~torch.cat([visual[:1] & False, visual[:-1]])
            text = Prefill(
                ids=ids[0],
                visual=visual,
                media=torch.where(visual, begins.cumsum(0) - 1, -1),
                embeds=output.hidden_states[0][0],
                hidden=output.hidden_states[-1][0],
                positions=torch.arange(ids.shape[1], device=ids.device),
            )
            found.append(Answer(text, start, taught(output.logits[0, start:], stop)))
    return found


def taught(logits: Tensor, stop: Sequence[int]) -> Tensor:
    """Return the laws a head learns, half of them without the tokens that end an answer.

    Args:
        logits: ``[n, V]`` of the model.
        stop: tokens that end an answer.

    Returns:
        float32 ``[n, V]``.

    Example:
        >>> taught(torch.zeros(1, 4), [3])[0].tolist()
        [0.2916666865348816, 0.2916666865348816, 0.2916666865348816, 0.125]
    """
    free = logits.float().index_fill(-1, torch.tensor(stop, device=logits.device), -torch.inf)
    return (logits.float().softmax(dim=-1) + free.softmax(dim=-1)) / 2


def _inputs(processor: Any, question: str, picture: Any) -> Any:
    content = [{"type": "image"}] * (picture is not None) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed and leave the caller's state of chance as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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


def new_head(model: Any, recipe: Recipe) -> nn.Module:
    """Make an untrained head; a decoder layer begins as the model's last one, ``fc`` as the mean of its two inputs."""
    data = sizes(model)
    width = data["hidden_size"]
    with _seeded(recipe.seed):
        head = _TRAINED[recipe.method].make(HeadConfig.read(data, width))
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


def train(
    model: Any, answers: Sequence[Answer], recipe: Recipe, *, steps: int | None = None, progress: bool = True
) -> tuple[nn.Module, list[float]]:
    """Train a head.

    Args:
        model: whose output layer the head shares.
        answers: what :func:`collect` returned.
        recipe: how.
        steps: steps to take; None for as many as the epochs have.
        progress: show a bar with the loss.

    Returns:
        The head, in evaluation mode, and the loss of each step. Equal arguments give equal weights on one machine.
    """
    head = new_head(model, recipe).train()
    output = model.get_output_embeddings()
    chance = torch.Generator().manual_seed(recipe.seed)
    total = steps or recipe.epochs * math.ceil(len(answers) / recipe.batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    order: list[int] = []
    history = []
    bar = tqdm(range(total), desc=recipe.method, disable=not progress)
    for step in bar:
        if len(order) < min(recipe.batch, len(answers)):
            order += torch.randperm(len(answers), generator=chance).tolist()
        picked, order = order[: recipe.batch], order[recipe.batch :]
        value = 0.0
        for index in picked:
            answer = noisy(answers[index], recipe.noise, chance)
            loss = _TRAINED[recipe.method].loss(head, answer, output, recipe, step / total) / len(picked)
            loss.backward()
            value += loss.item()
        nn.utils.clip_grad_value_(head.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.append(value)
        bar.set_postfix(loss=f"{value:.3f}")
    return head.eval().requires_grad_(False), history


def _rate(step: int, total: int) -> float:
    rise = max(1, total // 20)
    return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, total - rise))


def noisy(answer: Answer, width: float, chance: torch.Generator) -> Answer:
    """Add uniform noise to the hidden states a head reads, weaker in longer texts; what it learns stays."""
    hidden = answer.text.hidden
    noise = torch.rand(hidden.shape, generator=chance).to(hidden) - 0.5
    text = replace(answer.text, hidden=hidden + noise * width * 512 / len(hidden))
    return _Noisy(text, answer.start, answer.laws, hidden[answer.start :])


@dataclass(frozen=True)
class _Noisy(Answer):
    """An answer whose hidden states have noise, with those that have none."""

    clean: Tensor

    @property
    def wanted(self) -> Tensor:
        return self.clean


def _foretold(head: FeatureHead | LatentHead | HydraHeads, answer: Answer) -> Tensor:
    """Return outputs of the slots from that of the first token of the answer to the last that foretells: ``[n, D]``."""
    slots = head.prompt(answer.text)
    output = head.run(slots.inputs, slots.positions)
    return output[slots.places >= answer.start - 1]


def _msd(head: FeatureHead, answer: Answer, output: nn.Module, recipe: Recipe, done: float) -> Tensor:
    parts = []
    for features, log_q in _unrolled(head, answer, output, recipe.unroll):
        parts.append(losses.eagle1(features, answer.wanted, answer.laws, log_q))
    return torch.stack(parts).mean()


def _vispec(head: CompressedHead, answer: Answer, output: nn.Module, recipe: Recipe, done: float) -> Tensor:
    """Stage 1, EAGLE's loss, for half of the steps; then stage 2."""
    if done < 0.5:
        return _msd(head, answer, output, replace(recipe, unroll=0), done)
    parts = [losses.vispec(answer.laws, log_q) for _, log_q in _unrolled(head, answer, output, recipe.unroll)]
    return torch.stack(parts).mean()


def _unrolled(head: FeatureHead, answer: Answer, output: nn.Module, unroll: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield foretold states and laws of the teacher-forced pass, then of passes that read the head's own states."""
    for _ in range(unroll + 1):
        features = _foretold(head, answer)
        yield features, output(features).float().log_softmax(dim=-1)
        # The slot before the answer always reads a true state: nothing foretold it.
        hidden = torch.cat([answer.text.hidden[: answer.start], features])
        answer = replace(answer, text=replace(answer.text, hidden=hidden))


def _medusa(head: MedusaHeads, answer: Answer, output: nn.Module, recipe: Recipe, done: float) -> Tensor:
    features = head.features(answer.text.hidden[answer.start - 1 : -1])
    return _levels([output(found) for found in features], answer)


def _hydra(head: HydraHeads, answer: Answer, output: nn.Module, recipe: Recipe, done: float) -> Tensor:
    outputs, embeds = _foretold(head, answer), answer.text.embeds[answer.start :]
    count, found = len(outputs), []
    for level in range(min(len(head.hydra_mlp), count)):
        read = [outputs[: count - level], *(embeds[i : i + count - level] for i in range(level + 1))]
        found.append(output(head.features(level, torch.cat(read, dim=-1))))
    return _levels(found, answer)


def _levels(logits: Sequence[Tensor], answer: Answer) -> Tensor:
    """Weight the cross-entropy of heads that each look one token further than the one before."""
    parts = []
    for level, found in enumerate(logits[: len(answer.laws)]):
        laws = answer.laws[level:]
        parts.append(losses.soft_cross_entropy(laws, found[: len(laws)].float().log_softmax(dim=-1)).mean())
    return losses.decayed(parts, 0.8, first=1)


def _flash(head: LatentHead, answer: Answer, output: nn.Module, recipe: Recipe, done: float) -> Tensor:
    foretold = head.foretell(_foretold(head, answer))
    parts = []
    for level in range(min(head.steps, len(foretold))):
        features, laws = foretold[: len(foretold) - level, level], answer.laws[level:]
        parts.append(losses.eagle1(features, answer.wanted[level:], laws, output(features).float().log_softmax(dim=-1)))
    return torch.stack(parts).mean()


@dataclass(frozen=True)
class _Method:
    """How a head is made, from the sizes of a layer, and what it learns from one answer; it shares the output layer."""

    make: Callable[[HeadConfig], Any]
    loss: Callable[[Any, Answer, nn.Module, Recipe, float], Tensor]


_TRAINED = {
    "msd": _Method(lambda config: FeatureHead(config), _msd),
    "vispec": _Method(lambda config: CompressedHead(config), _vispec),
    "medusa": _Method(lambda config: MedusaHeads(config.width, LEVELS), _medusa),
    "hydra": _Method(lambda config: HydraHeads(config, 3, blocks=1), _hydra),
    "flash": _Method(lambda config: LatentHead(config, queries=16, steps=LEVELS), _flash),
}


def save_head(head: nn.Module, model: Any, recipe: Recipe, folder: Path) -> None:
    """Write ``model.safetensors`` as float16 and ``config.json`` with sizes and recipe.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous().cpu() for name, value in head.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    data = {**sizes(model), "method": recipe.method, "trained_with": asdict(recipe)}
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train a head for the embedded model and write it to a folder."""
    import mmfast

    parser = argparse.ArgumentParser(prog="python -m mmfast.training.draft_heads", description=main.__doc__)
    parser.add_argument("--method", choices=sorted(_TRAINED), default="msd")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name in ("prompts", "epochs", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    given = parser.parse_args(argv)
    recipe = Recipe(method=given.method, prompts=given.prompts, epochs=given.epochs, seed=given.seed)
    model, processor = mmfast.load_default()
    model.requires_grad_(False)
    answers = collect(model, processor, questions("train", recipe.prompts, recipe.seed), recipe)
    head, history = train(model, answers, recipe)
    save_head(head, model, recipe, given.out)
    sys.stdout.write(f"loss {history[0]:.3f} -> {history[-1]:.3f}; written to {given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
