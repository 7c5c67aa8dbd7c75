"""The loop: draft, verify, accept, until every answer has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmfast.decoding import Drafting
from mmfast.speculative.adaptive import Adaptive
from mmfast.speculative.base import Draft, Request, Session, Verified
from mmfast.speculative.verify import reject, walk

WAIT = 4
"""Rounds of a call without a draft, where its length follows from what pays: short answers cannot gain."""
_KEPT = 64
"""Rounds that a session is told of afterwards at most; then it begins, asked or not."""


@dataclass(frozen=True)
class Outcome:
    """What one forward of the model gave.

    Attributes:
        logits: ``[B, q, V]`` after each node.
        hidden: ``[B, q, D]`` last hidden states after the final norm.
    """

    logits: Tensor
    hidden: Tensor


class Target(Protocol):
    """The model that verifies."""

    def verify(self, drafts: Mapping[int, tuple[int, Draft]]) -> Outcome:
        """Run the root and the draft of each row in one forward; rows that have ended are not named."""

    def accept(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep the nodes of each path and forget the others."""

    def room(self) -> int | None:
        """Say how many tokens one forward may take, the root counted; None for any number."""


class Sampler(Protocol):
    """What turns logits into tokens, one after the other, as plain decoding does."""

    greedy: bool
    """Whether the likeliest token is taken as it is, without a processor."""

    def choose(self, row: int, logits: Tensor) -> int:
        """Choose the token that follows a row's answer so far, given ``[V]`` logits."""

    def law(self, row: int, logits: Tensor) -> Tensor:
        """Return the law ``[V]`` (float32) of the token that follows."""

    def emit(self, row: int, token: int) -> bool:
        """Give a token out; return whether the answer has ended."""

    def left(self, row: int) -> int:
        """Return how many tokens a row may still give."""


class Rounds:
    """Rounds of drafting and verifying.

    Args:
        target: the model.
        sampler: what turns logits into tokens.
        session: the drafter's, or what begins it once a draft is wanted.
        request: the call.
        most: tokens a draft has at most.
        trees: whether drafts branch.
        adaptive: chooses how many tokens to draft; None always drafts all.
        record: takes what happens.
        synchronize: waits for the device, so that times are those of the work.
    """

    def __init__(
        self,
        target: Target,
        sampler: Sampler,
        session: Session | Callable[[], Session],
        request: Request,
        *,
        most: int,
        trees: bool,
        adaptive: Adaptive | None,
        record: Drafting,
        synchronize: Callable[[], None],
    ) -> None:
        self.target, self.sampler, self.request = target, sampler, request
        self._session, self._round = session, 0
        self._missed: list[Mapping[int, Verified]] = []
        self.most, self.trees = most, trees
        self.adaptive, self.record, self.synchronize = adaptive, record, synchronize

    def run(self, roots: Mapping[int, int]) -> None:
        """Go on until every row has ended.

        Args:
            roots: row -> first token of its answer, of the rows that have not ended with it.
        """
        alive = dict(roots)
        while alive:
            begin = time.perf_counter()
            drafts = self._drafts(alive)
            middle = time.perf_counter()
            outcome = self.target.verify({row: (root, drafts[row]) for row, root in alive.items()})
            self.synchronize()
            end = time.perf_counter()
            verified, ended = self._walk(alive, drafts, outcome)
            self.target.accept({row: seen.path for row, seen in verified.items()})
            self._observe(verified)
            alive = {row: seen.emitted[-1] for row, seen in verified.items() if row not in ended}
            self._note(drafts, verified, ended, middle - begin, end - middle)

    def _drafts(self, roots: Mapping[int, int]) -> dict[int, Draft]:
        """Ask the drafter, and take out what cannot be."""
        self.budgets = budget = dict[int, int]()
        if self.adaptive is not None and self._round < WAIT:
            return dict.fromkeys(roots, Draft())
        room = self.target.room()
        for row in roots:
            # The model gives one token itself; a tree may be wider than what is left is long.
            left = self.sampler.left(row) - 1
            most = min(self.most, left) if not self.trees or left < 1 else self.most
            most = most if room is None else min(most, room - 1)
            if most > 0 and self.adaptive is not None:
                most = min(most, self.adaptive.budget(row, most))
            if most > 0:
                budget[row] = most
        found = self._begun().propose({row: roots[row] for row in budget}, budget) if budget else {}
        return {row: self._legal(found[row], budget[row]) if row in found else Draft() for row in roots}

    def _begun(self) -> Session:
        """Return the session; it is begun where it is first asked, and told what it has missed."""
        if not isinstance(self._session, Session):
            self._session = self._session()
            for verified in self._missed:
                self._session.observe(verified)
            self._missed.clear()
        return self._session

    def _observe(self, verified: Mapping[int, Verified]) -> None:
        self._round += 1
        if not isinstance(self._session, Session) and len(self._missed) < _KEPT:
            self._missed.append(verified)
        else:
            self._begun().observe(verified)

    def close(self) -> None:
        """Give back what the session holds."""
        if isinstance(self._session, Session):
            self._session.close()

    def _legal(self, draft: Draft, budget: int) -> Draft:
        """Cut a draft where it names what the model cannot say or takes more room than it has.

        A token that was drawn stays in whatever it is: taking it out for what it is would change the law.
        """
        request, parents = self.request, draft.tree()
        excluded = request.excluded if draft.laws is None else frozenset()
        place = {0: 0}
        tokens: list[int] = []
        kept: list[int] = []
        for node, token in enumerate(draft.tokens, start=1):
            legal = 0 <= token < request.vocabulary and token not in excluded
            again = any(tokens[i] == token and kept[i] == place.get(parents[node]) for i in range(len(tokens)))
            if len(tokens) == budget or not legal or again or parents[node] not in place:
                continue
            kept.append(place[parents[node]])
            tokens.append(token)
            place[node] = len(tokens)
        if len(tokens) == len(draft.tokens):
            return draft
        laws = None if draft.laws is None else draft.laws[: len(tokens)]
        return Draft(tuple(tokens), () if draft.chain else tuple(kept), laws)

    def _walk(
        self, roots: Mapping[int, int], drafts: Mapping[int, Draft], outcome: Outcome
    ) -> tuple[dict[int, Verified], set[int]]:
        best = outcome.logits.argmax(dim=-1).tolist() if self.sampler.greedy else None
        verified, ended = {}, set()
        for row, root in roots.items():
            draft = drafts[row]
            path, emitted, over = self._follow(row, draft, outcome.logits[row], None if best is None else best[row])
            if over:
                ended.add(row)
            nodes = len(draft.tokens) + 1
            verified[row] = Verified(
                (root, *draft.tokens),
                draft.tree(),
                path,
                emitted,
                outcome.logits[row, :nodes],
                outcome.hidden[row, :nodes],
            )
        return verified, ended

    def _follow(
        self, row: int, draft: Draft, logits: Tensor, best: list[int] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Give out tokens along a draft as long as the model goes along, and one of its own.

        Returns:
            The accepted nodes but the last one given out, the tokens, and whether the answer has ended.
        """
        emitted: list[int] = []
        over = False

        def ended(token: int) -> bool:
            nonlocal over
            emitted.append(token)
            over = self.sampler.emit(row, token)
            return over

        def choose(node: int, tokens: tuple[int, ...]) -> int:
            return self.sampler.choose(row, logits[node]) if best is None else best[node]

        def law(node: int, tokens: tuple[int, ...]) -> Tensor:
            return self.sampler.law(row, logits[node])

        def uniform() -> float:
            generator = self.request.generator[row]
            return float(torch.rand((), generator=generator, device=generator.device))

        accepted = walk(draft, choose, ended) if draft.laws is None else reject(draft, law, uniform, ended)
        return accepted.path, tuple(emitted), over

    def _note(
        self,
        drafts: Mapping[int, Draft],
        verified: Mapping[int, Verified],
        ended: set[int],
        drafting: float,
        verifying: float,
    ) -> None:
        longest = max(len(draft.tokens) for draft in drafts.values())
        drafted = any(self.budgets.values())
        for row, seen in verified.items():
            accepted = len(seen.path) - 1
            # What of a draft lies behind the end of an answer was neither right nor wrong.
            deep = accepted if row in ended else drafts[row].depth
            self.record.add(drafted=len(drafts[row].tokens), depth=deep, accepted=accepted, emitted=len(seen.emitted))
            if self.adaptive is not None:
                self.adaptive.record(row, len(drafts[row].tokens), accepted, deep, seen.path[1:])
        self.record.time(drafting, verifying)
        if self.adaptive is not None:
            if drafted:
                self.adaptive.drafting(longest, drafting)
            self.adaptive.cost(1 + longest, verifying)
