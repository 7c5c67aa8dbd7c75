"""A task whose questions can be made to fail, and whose summary is no mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mmfast.eval import Outcome, Sample, Scored, Task


@dataclass(frozen=True)
class Toy(Task):
    """Given samples, right if the answer is in the text; its headline is no mean."""

    name: ClassVar[str] = "toy"
    media: ClassVar[Any] = "image"
    metric: ClassVar[str] = "doubled"
    max_new_tokens: ClassVar[int] = 6

    given: tuple[Sample, ...] = ()
    refuses: str = ""

    def samples(self) -> Iterator[Sample]:
        yield from self.given

    def score(self, sample: Sample, prediction: str) -> Scored:
        if self.refuses and sample.sample_id == self.refuses and prediction:
            raise ArithmeticError("the scorer is out of order")
        return Scored(float(sample.answers[0] in prediction), prediction.strip(), {"weight": 2.0})

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        # What the scorer and the sample say besides the score must come through the files.
        values = [o.scored.score * float(o.scored.details["weight"]) * float(o.sample.details["one"]) for o in outcomes]
        return {"doubled": 100 * sum(values) / len(values)}
