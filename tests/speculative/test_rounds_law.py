"""Whole answers from the loop are distributed as those of plain sampling, whoever drafts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from mmfast.decoding import Drafting
from mmfast.speculative.base import Draft, Request, Session, Verified
from mmfast.speculative.decode import Outcome, Rounds
from support.acceptance import chi_square, doubles

VOCABULARY = 4
LENGTH = 4
ANSWERS = 4_000


class TableTarget:
    """A model of two rows whose logits depend on the last two tokens."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.before = {0: 0, 1: 1}
        self.nodes: dict[int, tuple[int, Draft]] = {}

    def verify(self, drafts: Mapping[int, tuple[int, Draft]]) -> Outcome:
        self.nodes = dict(drafts)
        most = 1 + max(len(draft.tokens) for _, draft in drafts.values())
        logits = torch.zeros(2, most, VOCABULARY)
        for row, (root, draft) in drafts.items():
            tokens, parents = (root, *draft.tokens), draft.tree()
            for node, token in enumerate(tokens):
                above = self.before[row] if node == 0 else tokens[parents[node]]
                logits[row, node] = self.table[above, token]
        return Outcome(logits, logits)

    def accept(self, paths: Mapping[int, Sequence[int]]) -> None:
        for row, path in paths.items():
            root, draft = self.nodes[row]
            self.before[row] = (root, *draft.tokens)[path[-1]]

    def room(self) -> int | None:
        return None


class TableSampler:
    """Sample from logits at some temperature until an answer has its length."""

    greedy = False

    def __init__(self, generator: torch.Generator, temperature: float) -> None:
        self.generator, self.temperature = generator, temperature
        self.answers: dict[int, list[int]] = {0: [], 1: []}

    def law(self, row: int, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(dim=-1)

    def choose(self, row: int, logits: Tensor) -> int:
        return int(torch.multinomial(self.law(row, logits), 1, generator=self.generator))

    def emit(self, row: int, token: int) -> bool:
        self.answers[row].append(token)
        return len(self.answers[row]) == LENGTH

    def left(self, row: int) -> int:
        return LENGTH - len(self.answers[row])


class Guess(Session):
    """Draft by a table of its own: the likeliest tokens, a tree of them, or tokens drawn from it."""

    def __init__(self, kind: str, table: Tensor, generator: torch.Generator) -> None:
        self.kind, self.laws, self.generator = kind, table.softmax(dim=-1), generator

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        return {row: self.draft(root, budget[row]) for row, root in roots.items()}

    def draft(self, root: int, budget: int) -> Draft:
        if self.kind == "tree":
            first = self.laws[root].topk(2).indices.tolist()
            second = self.laws[first[0]].topk(2).indices.tolist()
            tokens, parents = (*first, *second), (0, 0, 1, 1)
            return Draft(tokens[:budget], parents[:budget])
        tokens, laws = [], []
        for _ in range(budget):
            law = self.laws[tokens[-1] if tokens else root]
            drawn = self.kind == "drawn"
            laws.append(law)
            tokens.append(int(torch.multinomial(law, 1, generator=self.generator) if drawn else law.argmax()))
        return Draft(tuple(tokens), laws=torch.stack(laws) if self.kind == "drawn" else None)

    def observe(self, verified: Mapping[int, Verified]) -> None:
        """Learn nothing."""


def expected_law(table: Tensor, row: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Work out the law of a whole answer by enumeration."""
    laws = (table / temperature).softmax(dim=-1).double()
    found = {}
    for answer in itertools.product(range(VOCABULARY), repeat=LENGTH):
        above, token, chance = row, 2, 1.0
        for following in answer:
            chance *= float(laws[above, token, following])
            above, token = token, following
        found[answer] = chance
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["likeliest", "tree", "drawn"])
def test_law_of_whole_answers(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(11)
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
    guess = table.mean(dim=0) + 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    nobody = torch.nn.Identity()
    request = Request(
        prompts=((0,), (1,)), first=(2, 2), excluded=frozenset(), stop=frozenset(), vocabulary=VOCABULARY,
        max_new_tokens=LENGTH, sampling=True, law=lambda row, drafted, logits: logits, generator=[generator] * 2,
        device=torch.device("cpu"), dtype=torch.float32, embed=nobody, head=nobody,
    )  # fmt: skip
    seen: dict[int, Counter[tuple[int, ...]]] = {0: Counter(), 1: Counter()}
    record = Drafting()
    for _ in range(ANSWERS):
        sampler = TableSampler(generator, temperature)
        rounds = Rounds(
            TableTarget(table), sampler, Guess(kind, guess, generator), request,
            most=4, trees=kind == "tree", adaptive=None, record=record, synchronize=lambda: None,
        )  # fmt: skip
        rounds.run({0: 2, 1: 2})
        for row, answer in sampler.answers.items():
            seen[row][tuple(answer)] += 1
    assert record.accepted > 0.2 * record.emitted
    for row, counts in seen.items():
        law = expected_law(table, row, temperature)
        assert chi_square(doubles([counts[answer] for answer in law]), doubles(list(law.values()))) > 0.01
