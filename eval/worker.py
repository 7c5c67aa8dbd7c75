"""What a process of a cluster does: it holds a model and answers the shards it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mmfast.eval.loading import Prompt, count_selected, select
from mmfast.eval.records import Header, Record
from mmfast.eval.runner import Runner
from mmfast.eval.sweep import answers, pilot_prompts, refuse_unfit, with_matched
from mmfast.eval.task import Task


@dataclass(frozen=True)
class Described:
    """What the driver, which has neither model nor data, must know of a task.

    Attributes:
        headers: of every plan that is run, baselines among them.
        questions: how many there are.
        notes: why baselines were left out.
    """

    headers: Mapping[str, Header]
    questions: int
    notes: tuple[str, ...]


class Worker:
    """A process of the cluster with a model of its own; what its methods yield travels to the driver.

    Args:
        load: returns a model and its processor.
        settings: further arguments of :class:`~mmfast.eval.runner.Runner`.
        limit: questions of each task; None for all.
        seed: draw them by lot; None takes the first ones.
    """

    def __init__(
        self,
        load: Callable[[], tuple[nn.Module, Any]],
        settings: Mapping[str, Any],
        limit: int | None,
        seed: int | None,
    ) -> None:
        self._load, self._settings = load, settings
        self._limit, self._seed = limit, seed
        self._pilots: dict[str, list[Prompt]] = {}
        self._warm: set[str] = set()

    def open(self) -> None:
        """Load the model."""
        # Not in the constructor: what goes wrong there reaches the driver as text alone.
        model, processor = self._load()
        self._runner = Runner(model, processor, **self._settings)

    def describe(self, task: Task, asked: Sequence[str], with_baselines: bool) -> Iterator[Described]:
        """Yield one description of a task: the plans with their baselines, and how many questions there are.

        Raises:
            ValueError: if a plan does not suit the model.
        """
        refuse_unfit(self._runner.model, asked)
        notes: list[str] = []
        plans = with_matched(self._runner, asked, self._pilot(task), notes) if with_baselines else asked
        headers = {plan: self._header(task, plan) for plan in plans}
        yield Described(headers, count_selected(task, limit=self._limit), tuple(notes))

    def answer(
        self, task: Task, finished: Mapping[str, AbstractSet[str]], shard: tuple[int, int]
    ) -> Iterator[tuple[str, Header | Record]]:
        """Answer what one shard lacks; for every plan its header comes first.

        All plans answer a question on the same worker, in turns, so that their times can be compared.
        """
        for plan in finished:
            yield plan, self._header(task, plan)
        pilot = [] if task.name in self._warm else self._pilot(task)
        samples = select(task, limit=self._limit, seed=self._seed, shard=shard)
        yield from answers(self._runner, task, finished, samples, pilot)
        self._warm.add(task.name)

    def _pilot(self, task: Task) -> list[Prompt]:
        if task.name not in self._pilots:
            self._pilots[task.name] = pilot_prompts(self._runner, task, limit=self._limit, seed=self._seed)
        return self._pilots[task.name]

    def _header(self, task: Task, plan: str) -> Header:
        return replace(self._runner.header(task, plan), limit=self._limit, seed=self._seed)
