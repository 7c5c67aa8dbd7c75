"""A smaller vision-language model drafts, and sees the images."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mmfast.registry import parse_node, parse_text, register
from mmfast.speculative.base import Draft, Drafter, Request, Session, Verified, check_count
from mmfast.speculative.drafters.swift import check_share, read_step
from mmfast.speculative.goodput import stop_length
from mmfast.speculative.verify import draw

_OF_PROMPTS = ("before_llm", "in_llm", "encoder")
"""Stages of methods that have done with the prompt when it has been read."""


class Reading(Protocol):
    """A second model that has read the prompts of a call."""

    unread: Sequence[Sequence[int]]
    """Per row, tokens of the prompt that are still to be given to it."""

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Run the next tokens of the rows named; ``[B, V]`` logits of what follows."""

    def settle(self, kept: Mapping[int, int]) -> None:
        """Keep so many of the tokens that each row was given since the last time; none in rows that are not named."""

    def close(self) -> None:
        """Forget the prompts."""


class Companion(Protocol):
    """A second model."""

    vocabulary: int
    """Number of tokens it has logits for."""

    def read(self, request: Request) -> Reading | None:
        """Read the prompts of a call; None where it has not been given what it would need for that."""


class CompanionSession(Session):
    """One call of ``generate`` in which a second model drafts.

    Its cache holds what it has been given. After a round it keeps what was accepted, and is given the rest of the
    answer before it drafts again: the model's own token, and the last drafted one where that was accepted too.

    Args:
        request: the call.
        depth: tokens of a draft at most.
        risk: a draft ends once a rejection within it is likelier than that.
    """

    def __init__(self, request: Request, *, depth: int, risk: float) -> None:
        companion: Companion = request.companion
        self.request, self._depth, self._risk = request, depth, risk
        self._common = min(request.vocabulary, companion.vocabulary)
        self._known = companion.vocabulary
        self.reading = companion.read(request)
        unread: Sequence[Sequence[int]] = self.reading.unread if self.reading else [()] * len(request.first)
        self._pending = [[*own, first] for own, first in zip(unread, request.first, strict=True)]
        self._given = [0] * len(self._pending)
        self._lost = {row for row, own in enumerate(self._pending) if own[-1] >= self._known}

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        """Give the second model what it lacks of the answers, and let it go on."""
        tokens: dict[int, list[int]] = {row: [] for row in roots}
        laws: dict[int, list[Tensor]] = {row: [] for row in roots}
        sure: dict[int, list[float]] = {row: [] for row in roots}
        reading = self.reading
        following = {} if reading is None else {row: self._pending[row] for row in roots if row not in self._lost}
        while reading is not None and following:
            logits = reading.extend(following)[:, : self._common]
            for row, own in following.items():
                self._given[row] += len(own)
            chosen = self._drawn(logits, following, tokens, laws) if self.request.sampling else self._likeliest(logits)
            asked, following = list(following), {}
            for row in asked:
                token, likely = chosen[row]
                tokens[row].append(token)
                sure[row].append(likely)
                drafted = len(tokens[row])
                full = drafted >= min(budget[row], self._depth)
                # The rule leaves out the last token, whose chance its authors learn late; here it is known at once.
                risky = stop_length([*sure[row], 0.0, 0.0], self._risk, (1, drafted + 2)) == drafted + 1
                if not full and not risky and token not in self.request.stop:
                    following[row] = [token]
        drawn = self.request.sampling
        return {
            row: Draft(tuple(tokens[row]), (), torch.stack(laws[row]) if drawn and laws[row] else None) for row in roots
        }

    def _likeliest(self, logits: Tensor) -> dict[int, tuple[int, float]]:
        steps = read_step(self.request, logits, 1)
        return {row: (step.tokens[0], step.probability) for row, step in enumerate(steps)}

    def _drawn(
        self,
        logits: Tensor,
        rows: Mapping[int, Any],
        tokens: Mapping[int, Sequence[int]],
        laws: Mapping[int, list[Tensor]],
    ) -> dict[int, tuple[int, float]]:
        """Draw a token for each row, and keep the law it was drawn from."""
        request, found = self.request, {}
        missing = request.vocabulary - logits.shape[-1]
        wide = torch.nn.functional.pad(logits.float(), (0, missing), value=-torch.inf).to(request.device)
        for row in rows:
            law = request.law(row, tokens[row], wide[row])
            generator = request.generator[row]
            token = draw(law, float(torch.rand((), generator=generator, device=generator.device)))
            laws[row].append(law)
            found[row] = (token, float(law.max()))
        return found

    def observe(self, verified: Mapping[int, Verified]) -> None:
        """Keep what was accepted; note what the second model has not been given."""
        kept = {}
        for row, seen in verified.items():
            waiting, given = self._pending[row], self._given[row]
            if given:
                # What waited has been given, and of the draft perhaps all but the last token.
                known = min(len(seen.path) - 1, given - len(waiting))
                kept[row] = len(waiting) + known
                waiting.clear()
            else:
                known = 0
            waiting += seen.emitted[known:]
            self._given[row] = 0
            if any(token >= self._known for token in seen.emitted):
                self._lost.add(row)
        if self.reading is not None:
            self.reading.settle(kept)

    def close(self) -> None:
        """Let the second model forget the prompts."""
        if self.reading is not None:
            self.reading.close()


@register("assistant", stage="decode", paper="arXiv 2211.17192")
@dataclass(frozen=True)
class Assistant(Drafter):
    """Draft with a smaller vision-language model that reads the same images through an encoder of its own.

    Give it to ``accelerate`` as ``draft_model``. It reads what ``generate`` was called with, so both models must
    understand what one processor makes: the same tokens, and as many of them for each image. In later turns with the
    cache of the turn before it reads the whole conversation again; images of earlier turns need not be passed
    again as long as the conversation goes on from the last prompt that brought some, else it proposes nothing.

    Paper: "Fast Inference from Transformers via Speculative Decoding"; with a plan that prunes images,
    "SpecVLM: Enhancing Speculative Decoding of Video LLMs via Verifier-Guided Token Pruning" (arXiv 2508.16201).

    Attributes:
        num_draft: tokens of a draft at most.
        risk: a draft ends once a rejection within it is likelier than that, going by how sure the smaller model is
            of each token (SpecDec++ with its own certainty in place of a trained head); 1 for no such end.
        plan: what makes the smaller model faster, for example ``"divprune(keep=16)"``; empty for nothing.
    """

    stochastic: ClassVar[bool] = True
    companion: ClassVar[Literal["", "vision", "text"]] = "vision"

    num_draft: int = 5
    risk: float = 1.0
    plan: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_draft", self.num_draft, 1)
        check_share("risk", self.risk)
        if not isinstance(self.plan, str):
            raise TypeError(f"plan={self.plan!r} must be text such as 'divprune(keep=16)', or empty")
        for method in _methods(self.plan):
            if method.stage not in _OF_PROMPTS:
                raise ValueError(
                    f"plan={self.plan!r} must drop or merge tokens of the prompt for the smaller model, but "
                    f"{method.name!r} acts at stage {method.stage!r}; leave it out"
                )

    @property
    def most(self) -> int:
        """Tokens it proposes at most in a round, the root not counted."""
        return self.num_draft

    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``."""
        return CompanionSession(request, depth=self.num_draft, risk=self.risk)


def _methods(plan: str) -> list[Any]:
    """Build the methods of a plan.

    Raises:
        ValueError: naming what cannot be read.
    """
    if plan.strip() in ("", "full"):
        return []
    terms, found = [parse_text(plan)], []
    while terms:
        term = terms.pop()
        if isinstance(term, ast.BinOp) and isinstance(term.op, ast.Add):
            terms += [term.right, term.left]
        else:
            found.append(parse_node(term, plan))
    return found
