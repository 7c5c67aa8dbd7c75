"""Teaching a vision-language model conversations, with or without a plan at work on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import mmfast
from mmfast.adapters import prepare
from mmfast.training.conversations import Conversation, Source
from mmfast.training.objective import IGNORED, BadExample, Loss, Objective

Trained = Literal["all", "language", "projector", "language+projector", "plan"]


@dataclass(frozen=True)
class Taught:
    """A batch of conversations.

    Attributes:
        inputs: what the model takes; rows are padded on the left of the prompt and on the right of the answers.
        labels: int64 ``[B, S]``, the token of each place of an answer, -100 elsewhere.
        where: what the rows are.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    where: tuple[str, ...]

    def beside(self, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels where the model is."""
        place = next(model.parameters()).device
        return {name: value.to(place) for name, value in self.inputs.items()}, self.labels.to(place)


class Supervised(Objective):
    """Cross-entropy on the answers of conversations.

    Args:
        model: a vision-language model.
        processor: its processor.
        source: what it is taught.
        plan: at work while it learns: a model trained with dropped tokens bears dropping, and its steps are shorter.
        trained: ``"all"``, ``"language"`` (decoder and output layer), ``"projector"``, ``"language+projector"``, or
            ``"plan"``: nothing of the model, for the objectives that build on this one and teach parts of methods.

    Raises:
        ValueError: for another word, or if nothing is left to train.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Source,
        *,
        plan: str = "",
        trained: Trained = "all",
    ) -> None:
        super().__init__()
        self.model, self.processor, self.source = model, processor, source
        self.fast = mmfast.accelerate(model, plan) if plan else None
        self.trained = trained
        _choose(model, trained)

    def batch(self, step: int, part: int, parts: int, size: int) -> Taught:
        """Take the conversations of a step."""
        first = (step * parts + part) * size
        return encode(self.processor, [self.source.at(first + i) for i in range(size)])

    def forward(self, batch: Taught, done: float) -> Loss:
        """Compute the loss of the answers."""
        inputs, labels = batch.beside(self.model)
        with self._lesson(labels != IGNORED, done) as lesson:
            logits = self.model(**inputs, use_cache=False).logits
        loss, right = answer_loss(logits, labels)
        if self.fast is None:
            return Loss(loss, {"tokens_right": right})
        added = self.fast.training_losses(lesson)
        figures = {"answers": float(loss.detach()), **{name: float(own.detach()) for name, own in added.items()}}
        total = sum((own.to(loss.device) for own in added.values()), loss)
        return Loss(total, {"tokens_right": right, **(figures if added else {}), **lesson.figures})

    def _lesson(self, answers: Tensor, done: float) -> AbstractContextManager[Any]:
        """Tell the methods at work where the answers are: what a prompt decides, it decides before them."""
        return nullcontext() if self.fast is None else self.fast.training(answers, done=done)

    def weight(self, batch: Taught) -> float:
        """Count the tokens of the answers, over which the loss is the mean."""
        return float((batch.labels[:, 1:] != IGNORED).sum())

    def describe(self, batch: Taught) -> str:
        """Name the conversations."""
        return ", ".join(batch.where)

    def export(self, folder: Path) -> None:
        """Write the model as ``from_pretrained`` reads it."""
        if self.fast is not None:
            self.fast.remove()
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.processor.save_pretrained(folder)


def answer_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Return the mean cross-entropy of the tokens of answers, and the share of them that are foretold.

    Args:
        logits: ``[B, S, V]``.
        labels: int64 ``[B, S]``, -100 where nothing is to be learned.

    Example:
        >>> labels = torch.tensor([[-100, 1]])
        >>> loss, right = answer_loss(torch.tensor([[[0.0, 9.0], [0.0, 0.0]]]), labels)
        >>> round(loss.item(), 4), right
        (0.0001, 1.0)
    """
    learned = labels[:, 1:] != IGNORED
    rows, wanted = logits[:, :-1][learned].float(), labels[:, 1:][learned]
    loss = functional.cross_entropy(rows, wanted)
    return loss, float((rows.argmax(dim=-1) == wanted).float().mean())


def save_part(part: nn.Module, path: Path) -> None:
    """Write the weights of a learned part of a method, in the form its ``weights=`` loads."""
    save_file({name: value.detach().cpu().contiguous() for name, value in part.state_dict().items()}, path)


def encode(processor: Any, conversations: Sequence[Conversation], num_compressed: int | None = None) -> Taught:
    """Bring conversations into the form the model takes, through its chat template.

    Args:
        processor: of the model.
        conversations: one per row.
        num_compressed: compression tokens behind each image; None = as many as the processor says.

    Raises:
        BadExample: if the template does not write a conversation as its prompts and answers in turn.
    """
    prompts = prepare(
        processor,
        [c.turns[0][0] for c in conversations],
        [list(c.images) or None for c in conversations],
        [list(c.frames) or None for c in conversations],
        num_compressed=num_compressed,
    )
    ids, tails = prompts["input_ids"], [_tail(processor, c) for c in conversations]
    longest = max(len(tail) for tail in tails)
    rows, length = ids.shape
    added, labels, real = (torch.zeros(rows, longest, dtype=torch.long) for _ in range(3))
    labels.fill_(IGNORED)
    padding = processor.tokenizer.pad_token_id
    added.fill_(padding if padding is not None else 0)
    for row, tail in enumerate(tails):
        for place, (token, learned) in enumerate(tail):
            added[row, place], real[row, place] = token, 1
            labels[row, place] = token if learned else IGNORED
    inputs: dict[str, Tensor] = {}
    for name, value in prompts.items():
        if name == "input_ids":
            value = torch.cat([value, added], dim=1)
        elif name == "attention_mask":
            value = torch.cat([value, real], dim=1)
        elif value.ndim == 2 and value.shape == (rows, length):
            # Marks per token, such as which of them are visual: what is added is text.
            value = torch.cat([value, value.new_zeros(rows, longest)], dim=1)
        inputs[name] = value
    before = torch.full((rows, length), IGNORED)
    return Taught(inputs, torch.cat([before, labels], dim=1), tuple(c.where for c in conversations))


def _tail(processor: Any, conversation: Conversation) -> list[tuple[int, bool]]:
    """Return the tokens after the first prompt, and which of them are learned."""
    tail: list[tuple[int, bool]] = []
    for text, learned in _pieces(processor, conversation):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        tail += [(int(token), learned) for token in ids]
    return tail


def _pieces(processor: Any, conversation: Conversation) -> Iterator[tuple[str, bool]]:
    """Cut what the template writes behind the first prompt into answers and what stands between them."""
    end = processor.tokenizer.eos_token or ""
    if not _has_template(processor):
        for number, (question, answer) in enumerate(conversation.turns):
            if number:
                yield f"\n{question}\n", False
            yield f" {answer}{end}", True
        return
    messages: list[dict[str, Any]] = []
    before = ""
    for number, (question, answer) in enumerate(conversation.turns):
        messages.append(_said("user", question))
        prompt = _rendered(processor, messages, opened=True)
        if number:
            yield _without(prompt, before, conversation), False
        messages.append(_said("assistant", answer))
        whole = _rendered(processor, messages, opened=False)
        written = _without(whole, prompt, conversation)
        # The first occurrence: the token that closes an answer may contain its letters.
        start = written.find(answer.strip())
        if start < 0:
            raise BadExample(f"{conversation.where}: the chat template does not write the answer {answer!r} as it is")
        stop = start + len(answer.strip())
        close = stop + _length_of_end(processor.tokenizer, written[stop:])
        yield written[:close] if close > stop else written[:stop] + end, True
        before = whole[: len(prompt) + close]


def _length_of_end(tokenizer: Any, rest: str) -> int:
    """Count the characters up to the special token that closes an answer; 0 if the template writes none behind it."""
    # Models that chat may close with another token than that of the end of a text.
    known = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    begun = rest.lstrip()
    found = max((len(token) for token in known if begun.startswith(token)), default=0)
    return len(rest) - len(begun) + found if found else 0


def _has_template(processor: Any) -> bool:
    own = getattr(processor, "chat_template", None)
    return (own or getattr(processor.tokenizer, "chat_template", None)) is not None


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _rendered(processor: Any, messages: Sequence[dict[str, Any]], *, opened: bool) -> str:
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    text: str = processor.apply_chat_template(
        list(messages),
        chat_template=template if isinstance(template, str) else None,
        add_generation_prompt=opened,
        tokenize=False,
    )
    return text


def _without(whole: str, start: str, conversation: Conversation) -> str:
    if not whole.startswith(start):
        raise BadExample(
            f"{conversation.where}: the chat template writes earlier turns anew for later ones, so it cannot be cut "
            "into prompts and answers; give one question per conversation"
        )
    return whole[len(start) :]


def _choose(model: nn.Module, trained: str) -> None:
    """Ask for the gradients of what is trained, and of nothing else."""
    language, projector = ("language_model", "lm_head"), ("projector", "merger", "connector")
    named = {
        "all": ("",),
        "language": language,
        "projector": projector,
        "language+projector": (*language, *projector),
        "plan": (),
    }
    if trained not in named:
        raise ValueError(f"trained={trained!r} must be one of {', '.join(named)}")
    chosen = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in named[trained]))
        chosen += parameter.requires_grad
    if trained != "plan" and not chosen:
        raise ValueError(f"trained={trained!r} names no parameter of {type(model).__name__}")
