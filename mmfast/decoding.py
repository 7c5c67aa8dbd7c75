"""What was done beside plain decode steps: drafts and how they were judged, and compiled steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Drafting:
    """What drafting gave in the last call of ``generate``, all rows together.

    Attributes:
        rounds: forward passes of the model times the rows that took part in each; the prompt is not counted.
        plain_rounds: of these, those without a draft.
        drafted: tokens drafted.
        accepted: tokens of drafts that became part of an answer.
        emitted: tokens given out, the first of each answer not counted.
        tried: how often a draft reached the 1st, 2nd, ... place with all before it accepted.
        hit: how often it was accepted there.
        draft_seconds: time of the drafter.
        verify_seconds: time of the model's forward passes.
    """

    rounds: int = 0
    plain_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    tried: list[int] = field(default_factory=list)
    hit: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def add(self, *, drafted: int, depth: int, accepted: int, emitted: int) -> None:
        """Book one row of one round.

        Args:
            drafted: tokens drafted.
            depth: tokens on the longest path of the draft that were judged.
            accepted: tokens accepted.
            emitted: tokens given out.
        """
        self.rounds += 1
        self.plain_rounds += drafted == 0
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        for book, reached in ((self.tried, min(depth, accepted + 1)), (self.hit, accepted)):
            book += [0] * (reached - len(book))
            for place in range(reached):
                book[place] += 1

    def time(self, drafting: float, verifying: float) -> None:
        """Book the seconds of one round."""
        self.draft_seconds += drafting
        self.verify_seconds += verifying

    @property
    def tokens_per_forward(self) -> float:
        """Tokens given out per forward and row, the model's own token included (tau); 1 without drafting."""
        return self.emitted / self.rounds if self.rounds else 1.0

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens accepted per forward and row: tau without the model's own token."""
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share accepted at the 1st, 2nd, ... place of a draft, where all before it were."""
        hits = self.hit + [0] * (len(self.tried) - len(self.hit))
        return [hit / tried for hit, tried in zip(hits, self.tried, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **vars(self),
            "tokens_per_forward": self.tokens_per_forward,
            "mean_accepted": self.mean_accepted,
            "acceptance_rate": self.acceptance_rate,
            "acceptance": self.acceptance,
        }

    def __str__(self) -> str:
        if not self.drafted:
            return f"nothing drafted in {self.rounds} rounds: it would not have paid, or there was nothing to propose"
        places = ", ".join(f"{share:.2f}" for share in self.acceptance[:8])
        return (
            f"{self.tokens_per_forward:.2f} tokens per forward ({self.mean_accepted:.2f} drafted + the model's own), "
            f"{100 * self.acceptance_rate:.0f} % of {self.drafted} drafted accepted, by place {places}; "
            f"{self.plain_rounds} of {self.rounds} rounds without a draft"
        )


@dataclass
class Compilation:
    """How the decode steps of the last call of ``generate`` ran that was to be compiled.

    Attributes:
        failure: why they ran uncompiled; empty where they did not.
        seconds: time spent compiling in this call, which no other figure contains.
        steps: forward passes.
    """

    failure: str = ""
    seconds: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        spent = f"{self.seconds:.1f} s spent on compiling, counted nowhere else"
        return f"steps ran uncompiled: {self.failure} ({spent})" if self.failure else f"steps ran compiled ({spent})"
