"""Drafters that know the answer, for tests of the loop: right, wrong, in chains, trees, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmfast.registry import register, unregister
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified

ANSWERS: list[list[int]] = []
"""Per row, the tokens that the model gives without drafts."""


class _Oracle(RowSession):
    def __init__(self, drafter: Oracle, request: Request, answer: Sequence[int]) -> None:
        self.drafter, self.request, self.answer, self.given = drafter, request, list(answer), 1
        self.rounds = 0

    def propose(self, root: int, budget: int) -> Draft:
        self.rounds += 1
        vocabulary = self.request.vocabulary
        right = self.answer[self.given : self.given + min(budget, self.drafter.num_draft)]
        wrong = [(token + 1 + self.rounds) % vocabulary for token in right]
        if not right or (self.drafter.gaps and self.rounds % 3 == 0):
            return Draft()
        if self.drafter.shape == "tree":
            # A comb: every right token has a wrong sibling, before it in every second place, with a child of its own.
            tokens: list[int] = []
            parents: list[int] = []
            above = 0
            for place, (yes, no) in enumerate(zip(right, wrong, strict=True)):
                order = [yes, no] if place % 2 else [no, yes]
                tokens += order
                parents += [above, above]
                below = len(tokens) - 1 if order[0] == yes else len(tokens)
                if len(tokens) < budget:
                    tokens.append(yes)
                    parents.append(len(tokens) - 1 if order[1] == no else len(tokens) - 2)
                above = below
            return Draft(tuple(tokens[:budget]), tuple(parents[:budget]))
        until = len(right) if self.drafter.wrong_after is None else self.drafter.wrong_after
        tokens = right[:until] + wrong[until:]
        if self.drafter.drawn and self.request.sampling:
            laws = torch.full((len(tokens), vocabulary), 0.5 / vocabulary)
            laws[torch.arange(len(tokens)), torch.tensor(tokens)] += 0.5
            generator = self.request.generator[0]
            tokens = [int(torch.multinomial(law, 1, generator=generator)) for law in laws]
            return Draft(tuple(tokens), laws=laws)
        return Draft(tuple(tokens))

    def observe(self, verified: Verified) -> None:
        self.given += len(verified.emitted)


@register("oracle", stage="decode")
@dataclass(frozen=True)
class Oracle(Drafter):
    """Propose what the model will say.

    Attributes:
        num_draft: tokens.
        shape: ``"chain"`` or ``"tree"``.
        wrong_after: so many tokens are right; None = all.
        gaps: propose nothing in every third round.
        drawn: give laws where the call samples.
    """

    trees = True
    stochastic = True
    num_draft: int = 4
    shape: str = "chain"
    wrong_after: int | None = None
    gaps: bool = False
    drawn: bool = False

    @property
    def most(self) -> int:
        return 3 * self.num_draft

    def start(self, request: Request) -> Session:
        rows = ANSWERS if ANSWERS else [[] for _ in request.prompts]
        return EachRow([_Oracle(self, request, answer) for answer in rows])


unregister("oracle")


class registered:
    """Make the oracle known for a while."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = [list(row) for row in answers]

    def __enter__(self) -> None:
        register("oracle", stage="decode")(Oracle)
        ANSWERS[:] = self.answers

    def __exit__(self, *_: object) -> None:
        unregister("oracle")
        ANSWERS.clear()
