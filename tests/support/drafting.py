"""A target that costs nothing, and the rounds of drafting played with it, for tests of trained drafters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.speculative.base import Draft, Drafter, Prefill, Request, Session, Verified
from mmfast.speculative.tree import path_to


class Toy:
    """A recurrent stand-in for a model: hidden states depend on all tokens before, images included."""

    def __init__(
        self, width: int = 16, vocabulary: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.width, self.vocabulary, self.dtype = width, vocabulary, dtype
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        for layer in (self.embed, self.head):
            layer.requires_grad_(False)
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=chance, dtype=dtype))
        self.mix = torch.randn(width, width, generator=chance, dtype=dtype) / width**0.5

    def hidden(self, embeds: Tensor) -> Tensor:
        """Return the hidden states of a whole sequence, ``[n, D]``."""
        state, found = torch.zeros(self.width, dtype=self.dtype), []
        for embed in embeds:
            state = torch.tanh(0.6 * state @ self.mix + 0.7 * embed)
            found.append(state)
        return torch.stack(found)

    def prompt(self, parts: Sequence[int | tuple[int, int]], seed: int = 0, rows: int = 1) -> Prefill:
        """Make a prompt.

        Args:
            parts: so many tokens of text, or an image or frame: ``(number, tokens)``, its number counted from 0.
            seed: of the tokens.
            rows: of positions; 3 gives images a grid of two columns.
        """
        chance = torch.Generator().manual_seed(seed)
        embeds, ids, media, positions, at = [], [], [], [], 0
        for part in parts:
            if isinstance(part, int):
                tokens = torch.randint(2, self.vocabulary, (part,), generator=chance)
                embeds.append(self.embed(tokens))
                ids.append(tokens)
                media += [-1] * part
                positions.append((torch.arange(part) + at).expand(3, part))
                at += part
            else:
                number, count = part
                embeds.append(torch.randn(count, self.width, generator=chance, dtype=self.dtype))
                ids.append(torch.zeros(count, dtype=torch.int64))
                media += [number] * count
                steps = torch.arange(count)
                grid = torch.stack([torch.zeros_like(steps), steps // 2, steps % 2])
                positions.append((grid if rows == 3 else steps.expand(3, count)) + at)
                at = int(positions[-1].max()) + 1
        where = torch.cat(positions, dim=1)
        joined, numbers = torch.cat(embeds), torch.tensor(media)
        return Prefill(
            torch.cat(ids), numbers >= 0, numbers, joined, self.hidden(joined), where if rows == 3 else where[0]
        )

    def request(self, prompts: Sequence[Prefill], **changes: Any) -> Request:
        """Make the request of a call."""
        given: dict[str, Any] = {
            "prompts": tuple(tuple(prompt.ids.tolist()) for prompt in prompts),
            "first": tuple(self.next(prompt.embeds) for prompt in prompts),
            "excluded": frozenset({0}),
            "stop": frozenset({1}),
            "vocabulary": self.vocabulary,
            "max_new_tokens": 100,
            "sampling": False,
            "law": lambda ids, logits: logits.float().softmax(dim=-1),
            "generator": [torch.Generator() for _ in prompts],
            "device": torch.device("cpu"),
            "dtype": self.dtype,
            "prefill": tuple(prompts),
            "embed": self.embed,
            "head": self.head,
        }
        return Request(**{**given, **changes})

    def next(self, embeds: Tensor) -> int:
        """Return the likeliest next token, never a placeholder nor a stop."""
        logits = self.head(self.hidden(embeds)[-1])
        logits[:2] = -torch.inf
        return int(logits.argmax())

    def longer(self, prompt: Prefill, tokens: Sequence[int]) -> Prefill:
        """Return the prompt as if the tokens had been part of it."""
        new = torch.tensor(list(tokens), dtype=torch.int64)
        embeds = torch.cat([prompt.embeds, self.embed(new)])
        last = prompt.positions[..., -1:]
        return replace(
            prompt,
            ids=torch.cat([prompt.ids, new]),
            visual=torch.cat([prompt.visual, torch.zeros(len(new), dtype=torch.bool)]),
            media=torch.cat([prompt.media, torch.full((len(new),), -1)]),
            embeds=embeds,
            hidden=self.hidden(embeds),
            positions=torch.cat([prompt.positions, last + 1 + torch.arange(len(new))], dim=-1),
        )

    def verify(self, prompt: Prefill, answer: Sequence[int], draft: Draft, accept: int) -> Verified:
        """Run a draft, every path on its own.

        Args:
            prompt: the prompt.
            answer: what was given so far; its last token is the root.
            draft: the draft.
            accept: tokens to accept at most, along the branch that goes deepest: which is right does not matter.
        """
        tokens, parents = (answer[-1], *draft.tokens), draft.tree()
        before = torch.cat([prompt.embeds, self.embed(torch.tensor(list(answer[:-1]), dtype=torch.int64))])
        paths = [path_to(parents, node) for node in range(len(tokens))]
        inside = [torch.cat([before, self.embed(torch.tensor([tokens[i] for i in path]))]) for path in paths]
        hidden = torch.stack([self.hidden(embeds)[-1] for embeds in inside])
        path = max(paths, key=len)[: accept + 1]
        bonus = self.next(inside[path[-1]])
        emitted = (*(tokens[node] for node in path[1:]), bonus)
        return Verified(tokens, parents, path, emitted, self.head(hidden), hidden)


@dataclass
class Play:
    """Rounds of one call.

    Attributes:
        answers: per row, what was given.
        drafts: per round, row -> draft.
    """

    toy: Toy
    request: Request
    session: Session
    answers: list[list[int]]
    drafts: list[dict[int, Draft]] = field(default_factory=list)

    @classmethod
    def start(cls, toy: Toy, drafter: Drafter, prompts: Sequence[Prefill], **changes: Any) -> Play:
        """Begin a call."""
        request = toy.request(prompts, **changes)
        return cls(toy, request, drafter.start(request), [[first] for first in request.first])

    def round(self, budget: int = 100, accept: int = 100, silent: Sequence[int] = ()) -> dict[int, Draft]:
        """Draft, accept and observe.

        Args:
            budget: tokens per row.
            accept: tokens to accept at most.
            silent: rows that are not asked, as where the budget is 0.
        """
        asked = [row for row in range(len(self.answers)) if row not in silent]
        roots = {row: self.answers[row][-1] for row in asked}
        drafts = self.session.propose(roots, dict.fromkeys(asked, budget)) if asked else {}
        assert set(drafts) == set(asked)
        seen = {
            row: self.toy.verify(self.request.prefill[row], answer, drafts.get(row, Draft()), accept)
            for row, answer in enumerate(self.answers)
        }
        self.session.observe(seen)
        for row, verified in seen.items():
            self.answers[row] += verified.emitted
        self.drafts.append(drafts)
        return drafts


def check_draft(draft: Draft, request: Request, budget: int) -> None:
    """Assert what the loop may take for granted."""
    assert len(draft.tokens) <= budget
    parents = draft.tree()
    seen: set[tuple[int, int]] = set()
    for node, token in enumerate(draft.tokens, start=1):
        assert 0 <= token < request.vocabulary
        assert token not in request.excluded
        assert (parents[node], token) not in seen
        seen.add((parents[node], token))
        assert parents[node] == 0 or draft.tokens[parents[node] - 1] not in request.stop


def tokens_per_forward(request: Request, drafter: Drafter, answer: Sequence[int], hidden: Tensor) -> float:
    """Play a recorded greedy answer against a drafter.

    Args:
        request: of one row, whose ``first`` is the first token of the answer.
        drafter: the drafter.
        answer: the tokens of the model.
        hidden: ``[n, D]``, its last hidden states at these tokens.

    Returns:
        Tokens after the first per forward of the model, the model's own token of each round included.
    """
    session = drafter.start(request)
    place = rounds = 0
    while place < len(answer) - 1:
        left = len(answer) - 1 - place
        draft = session.propose({0: answer[place]}, {0: drafter.most})[0]
        check_draft(draft, request, drafter.most)
        parents, tokens, path = draft.tree(), (answer[place], *draft.tokens), [0]
        while len(path) < left:
            wanted = answer[place + len(path)]
            step = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == wanted]
            if not step:
                break
            path += step
        # Only accepted nodes are true; what the others hold must not matter.
        states = torch.full((len(tokens), hidden.shape[1]), torch.nan)
        states[path] = hidden[place : place + len(path)]
        emitted = tuple(answer[place + 1 : place + 1 + len(path)])
        assert request.head is not None
        logits = torch.zeros(len(tokens), request.vocabulary)
        logits[path] = request.head(states[path])
        session.observe({0: Verified(tokens, parents, tuple(path), emitted, logits, states)})
        place, rounds = place + len(path), rounds + 1
    return (len(answer) - 1) / rounds
