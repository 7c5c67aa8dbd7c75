"""What draft heads learn from: answers of the model itself, kept in the run's folder, and what it thought of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mmfast.adapters import prepare
from mmfast.speculative.base import Prefill
from mmfast.training.conversations import Conversation, Source
from mmfast.training.draft_heads.options import HeadOptions

BLOCK = 32
"""Answers per file: as many are lost at most when the run is killed while the model writes."""

# What the answers depend on: runs that agree in these may take over each other's files.
_SHAPING = ("prompts", "new_tokens", "past_end", "sampled", "temperature", "together", "seed")


@dataclass(frozen=True)
class Answer:
    """What the model made of a question and its own answer.

    Attributes:
        text: all tokens; the hidden states are those that a head reads.
        start: place of the first token of the answer.
        laws: float32 ``[n, V]``, what is learned to follow each token of the answer, see :func:`taught`.
        wanted: ``[n, D]``, the model's last hidden states of the answer, which a head learns.
        where: what was asked, for messages.
    """

    text: Prefill
    start: int
    laws: Tensor
    wanted: Tensor
    where: str = ""

    def to(self, device: torch.device | str) -> Answer:
        """Return a copy on a device."""
        text = Prefill(**{name: value.to(device) for name, value in vars(self.text).items()})
        return replace(self, text=text, laws=self.laws.to(device), wanted=self.wanted.to(device))

    @property
    def bytes(self) -> int:
        """Size of what it holds."""
        return sum(value.nbytes for value in (*vars(self.text).values(), self.laws, self.wanted))


@dataclass(frozen=True)
class Written:
    """Tokens of a prompt, int64 ``[P]``, and of the answer that the model wrote, int64 ``[n]``."""

    prompt: Tensor
    answer: Tensor


class Answers:
    """The answers of a model to the first questions of its data.

    The tokens are written once, into files of the run's folder, and depend on the options alone; copied to the folder
    of another run, for another kind of head, they are not written again. Hidden states are computed from them when
    they are asked for, and kept as long as there is room.

    Args:
        model: whose text positions count tokens, as those of LLaVA models do.
        processor: of the model.
        source: the questions; answers in it are not read.
        options: how many answers, how long, how drawn.

    Raises:
        ValueError: if positions of the model have several dimensions.
    """

    def __init__(self, model: Any, processor: Any, source: Source, options: HeadOptions) -> None:
        if "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
            raise ValueError("positions of this model have several dimensions; heads are trained for those of one")
        self.model, self.processor, self.source, self.options = model, processor, source, options
        self._folder: Path | None = None
        self._written: dict[int, Written] = {}
        self._kept: dict[int, Answer] = {}
        self._room = options.memory * 2**30

    def __len__(self) -> int:
        return self.options.prompts

    def collect(self, folder: Path, part: int = 0, parts: int = 1) -> None:
        """Let the model write what the folder lacks.

        Args:
            folder: of the run; the answers lie in ``answers`` below it.
            part: which share of the files is written here.
            parts: number of shares, each written by a process.

        Raises:
            ValueError: if the folder holds answers that were collected under other options, or does not say which.
            BadExample: for a question that cannot be used.
        """
        self._folder = folder / "answers"
        self._folder.mkdir(parents=True, exist_ok=True)
        shaping = {name: getattr(self.options, name) for name in _SHAPING}
        _claim(self._folder, shaping, part)
        missing = [b for b in range(math.ceil(len(self) / BLOCK))[part::parts] if not self._file(b).is_file()]
        for block in tqdm(missing, desc="answers", unit=f"x{BLOCK}", disable=None):
            numbers = range(block * BLOCK, min((block + 1) * BLOCK, len(self)))
            rows = write(self.model, self.processor, [self.source.at(n) for n in numbers], numbers, self.options)
            self._save(block, dict(zip(numbers, rows, strict=True)))

    def written(self, number: int) -> Written:
        """Return the tokens of one answer.

        Raises:
            ValueError: before :meth:`collect`.
        """
        if number not in self._written:
            tensors = load_file(self._file(number // BLOCK))
            for n in {int(name.partition(".")[0]) for name in tensors}:
                self._written[n] = Written(tensors[f"{n}.prompt"].long(), tensors[f"{n}.answer"].long())
        return self._written[number]

    def sees(self, number: int) -> bool:
        """Say whether there is a picture or clip before an answer."""
        return bool(_visual(self.model, self.written(number).prompt).any())

    def at(self, number: int) -> Answer:
        """Return an answer with what the model thought of it.

        Raises:
            ValueError: if the data are others than those the answers were collected for.
        """
        if number not in self._kept:
            found = recall(self.model, self.processor, self.source.at(number), self.written(number), self.options)
            if found.bytes > self._room:
                return found
            self._room -= found.bytes
            self._kept[number] = found
        return self._kept[number]

    def _file(self, block: int) -> Path:
        if self._folder is None:
            raise ValueError("no answers yet; call collect() first")
        return self._folder / f"block-{block:05d}.safetensors"

    def _save(self, block: int, rows: dict[int, Written]) -> None:
        """Write a file whole or not at all."""
        tensors = {f"{n}.prompt": row.prompt.int() for n, row in rows.items()}
        tensors |= {f"{n}.answer": row.answer.int() for n, row in rows.items()}
        fresh = self._file(block).with_suffix(".part")
        save_file(tensors, fresh)
        fresh.replace(self._file(block))


@torch.no_grad()
def write(
    model: Any, processor: Any, conversations: Sequence[Conversation], numbers: Sequence[int], options: HeadOptions
) -> list[Written]:
    """Let the model answer the first question of each conversation.

    Args:
        model: a vision-language model.
        processor: of the model.
        conversations: with the questions.
        numbers: of the conversations; they say which answers are drawn, and how.
        options: how long the answers are.

    Returns:
        Prompts and answers, in order, on the CPU.
    """
    found: dict[int, Written] = {}
    kinds: dict[bool, list[int]] = {False: [], True: []}
    for row, number in enumerate(numbers):
        kinds[math.floor((number + 1) * options.sampled) > math.floor(number * options.sampled)].append(row)
    for drawn, rows in kinds.items():
        for first in range(0, len(rows), options.together):
            group = rows[first : first + options.together]
            with seeded(options.seed * 1_000_003 + numbers[group[0]]):
                written = _generate(model, processor, [conversations[row] for row in group], drawn, options)
            found |= dict(zip(group, written, strict=True))
    return [found[row] for row in range(len(conversations))]


def _generate(
    model: Any, processor: Any, asked: Sequence[Conversation], drawn: bool, options: HeadOptions
) -> list[Written]:
    inputs = inputs_of(processor, asked).to(model.device)
    stop = stop_tokens(model)
    ids = model.generate(
        **inputs,
        max_new_tokens=options.new_tokens,
        do_sample=drawn,
        **({"temperature": options.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}),
        **({"suppress_tokens": stop} if options.past_end else {}),
    ).cpu()
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool().cpu()
    return [Written(row[:length][real[i]], _ended(row[length:], stop)) for i, row in enumerate(ids)]


def _ended(tokens: Tensor, stop: Sequence[int]) -> Tensor:
    """Cut an answer behind the first token that ends it."""
    ends = torch.isin(tokens, torch.tensor(stop)).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


@torch.no_grad()
def recall(model: Any, processor: Any, asked: Conversation, written: Written, options: HeadOptions) -> Answer:
    """Run the model over a question and its answer.

    Args:
        model: a vision-language model.
        processor: of the model.
        asked: the question.
        written: what :func:`write` returned for it.
        options: whether answers go on past their end.

    Raises:
        ValueError: if the question is not the one that was answered.
    """
    inputs = inputs_of(processor, [asked])
    prompt = inputs["input_ids"]
    if not torch.equal(prompt[0], written.prompt):
        raise ValueError(
            f"{asked.where}: the stored answer is to another question; train into another folder, or take the data it "
            "was begun with"
        )
    start, added = prompt.shape[1], len(written.answer)
    for name, value in inputs.items():
        if value.shape == prompt.shape:
            # Marks per token, such as which of them are visual: the answer is text.
            inputs[name] = torch.cat([value, value.new_zeros(1, added)], dim=1)
    ids = torch.cat([written.prompt, written.answer]).to(model.device)
    whole = {**inputs.to(model.device), "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    output = model(**whole, output_hidden_states=True, use_cache=False)
    visual = _visual(model, ids)
    begins = visual & ~torch.cat([visual[:1] & False, visual[:-1]])
    hidden = output.hidden_states[-1][0].float()
    text = Prefill(
        ids=ids,
        visual=visual,
        media=torch.where(visual, begins.cumsum(0) - 1, -1),
        embeds=output.hidden_states[0][0].float(),
        hidden=hidden,
        positions=torch.arange(len(ids), device=ids.device),
    )
    laws = taught(output.logits[0, start:], stop_tokens(model) if options.past_end else ())
    return Answer(text, start, laws, hidden[start:], asked.where)


def taught(logits: Tensor, stop: Sequence[int]) -> Tensor:
    """Return the laws a head learns, half of them without the tokens that end an answer.

    The model's law alone says nothing of how an answer goes on where it could end; what is left of it where answers
    may not end never ends one.

    Args:
        logits: ``[n, V]`` of the model.
        stop: tokens that end an answer; none takes the model's law as it is.

    Returns:
        float32 ``[n, V]``.

    Example:
        >>> taught(torch.zeros(1, 4), [3])[0].tolist()
        [0.2916666865348816, 0.2916666865348816, 0.2916666865348816, 0.125]
    """
    law = logits.float().softmax(dim=-1)
    if not stop:
        return law
    free = logits.float().index_fill(-1, torch.tensor(stop, device=logits.device), -torch.inf)
    return (law + free.softmax(dim=-1)) / 2


def noisy(answer: Answer, width: float, chance: torch.Generator) -> Answer:
    """Add uniform noise to the hidden states a head reads, weaker in longer texts; what it learns stays."""
    hidden = answer.text.hidden
    noise = torch.rand(hidden.shape, generator=chance).to(hidden) - 0.5
    return replace(answer, text=replace(answer.text, hidden=hidden + noise * width * 512 / len(hidden)))


def inputs_of(processor: Any, asked: Sequence[Conversation]) -> Any:
    """Bring the first question of each conversation into the form the model takes, padded on the left."""
    return prepare(
        processor,
        [c.turns[0][0] for c in asked],
        [list(c.images) or None for c in asked],
        [list(c.frames) or None for c in asked],
    )


def stop_tokens(model: Any) -> list[int]:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed and leave the caller's state of chance as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _visual(model: Any, ids: Tensor) -> Tensor:
    tokens = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return torch.isin(ids, torch.tensor([t for t in tokens if t is not None], dtype=ids.dtype, device=ids.device))


def _claim(folder: Path, shaping: dict[str, Any], part: int) -> None:
    """Say in a folder what its answers depend on, or check that they were written under the same options."""
    path = folder / "options.json"
    # Looked for first: whoever writes answers has said before what they depend on.
    begun = any(folder.glob("block-*.safetensors"))
    if not path.is_file():
        if begun:
            raise ValueError(
                f"{folder} holds answers but no {path.name} that says how they were written; delete them, or train "
                "into another folder"
            )
        fresh = folder / f"options-{part}.part"
        fresh.write_text(json.dumps(shaping, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
        return
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name, value in shaping.items() if stored.get(name) != value]
    if differing:
        listed = ", ".join(f"{name}={stored.get(name)!r} (now {shaping[name]!r})" for name in differing)
        raise ValueError(f"{path.parent} holds answers of a run with {listed}; train into another folder")
