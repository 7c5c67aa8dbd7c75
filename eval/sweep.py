"""Many plans on many tasks, in turn, kept on disk, resumable, with the baselines that belong beside them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

import mmfast
from mmfast.eval.baselines import baseline_name, baselines, budget
from mmfast.eval.loading import Prompt, batches, count_selected, select
from mmfast.eval.records import Record
from mmfast.eval.results import ResultsFile, file_name
from mmfast.eval.runner import WARMUP, Runner
from mmfast.eval.summary import Table, summarize
from mmfast.eval.task import Sample, Task
from mmfast.media import prefetched

PILOT = 4
"""Questions on which it is found out how many tokens a plan leaves."""

# Plans take turns after a few questions, so that a machine that gets slower or faster does so for all of them.
_TURN = 8
_Turn: TypeAlias = tuple[list[tuple[Sample, ...]], dict[tuple[str, ...], list[Prompt]]]


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        task: the task at work.
        plan: the plan at work.
        done: questions answered in this process.
        total: questions this process has to answer, all plans and tasks.
        seconds_left: estimate from the last questions; None before there is one.
    """

    task: str
    plan: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class _Job:
    """One task with the files of its plans, prompts to warm up with, and the questions of this shard."""

    task: Task
    files: dict[str, ResultsFile]
    pilot: list[Prompt]
    questions: int

    @property
    def open(self) -> int:
        """Answers that are missing, as long as the files hold no other questions."""
        return sum(max(0, self.questions - len(file.finished)) for file in self.files.values())


class Clock:
    """Counts answers and tells whoever watches."""

    def __init__(self, total: int, watch: Callable[[Progress], None] | None) -> None:
        self._total, self._watch, self._done = total, watch, 0
        self._begin = time.perf_counter()

    def tick(self, task: str, plan: str) -> None:
        """Count one answer."""
        self._done += 1
        if self._watch is not None:
            passed = time.perf_counter() - self._begin
            left = passed / self._done * max(0, self._total - self._done)
            self._watch(Progress(task, plan, self._done, self._total, left))


def evaluate(
    model: nn.Module,
    processor: Any,
    tasks: Sequence[Task],
    plans: Sequence[mmfast.Plan | str],
    *,
    out: str | Path,
    with_baselines: bool = True,
    limit: int | None = None,
    seed: int | None = None,
    shard: tuple[int, int] = (0, 1),
    batch: int = 1,
    max_new_tokens: int | None = None,
    frames: int = 8,
    name: str | None = None,
    retry_failed: bool = False,
    progress: bool | Callable[[Progress], None] = False,
) -> Table:
    """Answer every task under every plan and the baselines that belong to it, and summarise.

    Every answer is on disk when the next question is asked. A sweep that was broken off goes on where it stopped when
    it is called again with the same folder; shards may run in processes of their own, with the same folder.

    Args:
        model: an unmodified vision-language model.
        processor: its processor.
        tasks: the data sets.
        plans: plans, as text or objects; the full model is always run.
        out: folder of the results.
        with_baselines: run beside each plan random (three seeds), uniform, pool2d and downsample with as many visual
            tokens per layer as the plan leaves on average. Plans that leave the visual tokens alone need none.
        limit: questions of each task in all shards together; None for all.
        seed: draw them by lot; None takes the first ones.
        shard: number of the shard from 0, and how many there are.
        batch: questions answered at once; only batches of one are timed.
        max_new_tokens: tokens an answer may have; None leaves it to the task.
        frames: frames taken from a video file.
        name: what the results call the model; None takes what :class:`Runner` calls it.
        retry_failed: ask questions again that failed in an earlier run.
        progress: called after every answer; True shows a bar.

    Returns:
        The table of everything that lies in ``out``.

    Raises:
        ValueError: if a plan does not suit the model, a number is out of range, two tasks have one name, or the
            folder holds results that do not fit.
        BlockingIOError: if another process is writing the same part of the results to the folder.
        FileNotFoundError: if the files of a task are missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from mmfast.eval.datasets import task
        >>> model, processor = mmfast.load_default()
        >>> with TemporaryDirectory() as folder:
        ...     table = evaluate(model, processor, [task("shapes-image")], ["uniform(keep=64)"], out=folder, limit=2)
        >>> [(row.plan, row.n) for row in table.rows]
        [('full', 2), ('uniform(keep=64)', 2)]
    """
    runner = Runner(model, processor, name=name, batch=batch, max_new_tokens=max_new_tokens, frames=frames)
    asked = asked_plans(tasks, plans)
    refuse_unfit(model, asked)
    folder = Path(out)
    notes: list[str] = []
    with ExitStack() as stack:
        jobs = []
        for task in tasks:
            # The same questions in every shard: they decide which baselines are run.
            pilot = pilot_prompts(runner, task, limit=limit, seed=seed)
            files = {}
            for text in with_matched(runner, asked, pilot, notes) if with_baselines else asked:
                header = replace(runner.header(task, text), limit=limit, seed=seed, shard=f"{shard[0]}/{shard[1]}")
                path = folder / file_name(task.name, text, runner.name, shard)
                files[text] = stack.enter_context(ResultsFile(path, header, retry_failed=retry_failed))
            jobs.append(_Job(task, files, pilot, count_selected(task, limit=limit, shard=shard)))
        with watching(progress) as watch:
            clock = Clock(sum(job.open for job in jobs), watch)
            for job in jobs:
                finished = {plan: file.finished for plan, file in job.files.items()}
                chosen = select(job.task, limit=limit, seed=seed, shard=shard)
                for plan, record in answers(runner, job.task, finished, chosen, job.pilot):
                    job.files[plan].append(record)
                    clock.tick(job.task.name, plan)
    table = summarize([folder], tasks=tasks)
    return replace(table, notes=(*table.notes, *dict.fromkeys(notes)))


def asked_plans(tasks: Sequence[Task], plans: Sequence[mmfast.Plan | str]) -> list[str]:
    """Write each plan once, the full model first.

    Raises:
        ValueError: if two tasks have one name, or a plan cannot be read.

    Example:
        >>> asked_plans([], ["uniform(keep=64)", "uniform(keep = 64)"])
        ['full', 'uniform(keep=64)']
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have different names, got {names}; give each variant a folder of its own")
    return list(dict.fromkeys(["full", *(mmfast.Plan.of(plan).to_text() for plan in plans)]))


def refuse_unfit(model: nn.Module, plans: Sequence[str]) -> None:
    """Refuse plans that do not suit the model before hours are spent on those before them.

    Raises:
        ValueError: saying why the first of them does not.
    """
    for plan in plans:
        mmfast.accelerate(model, plan).remove()


def pilot_prompts(runner: Runner, task: Task, *, limit: int | None, seed: int | None) -> list[Prompt]:
    """Prepare the first questions, the same in every shard: they decide which baselines are run."""
    first = itertools.islice(select(task, limit=limit, seed=seed), PILOT)
    return [prompt for sample in first for prompt in runner.prompts([sample])]


def with_matched(runner: Runner, asked: Sequence[str], pilot: Sequence[Prompt], notes: list[str]) -> list[str]:
    """Add to the plans the baselines of all of them; of those that this model cannot run, note why."""
    found: list[str] = []
    full = runner.reports("full", pilot)
    for plan in asked:
        keep = None if baseline_name(plan) else budget(runner.reports(plan, pilot), full)
        found += baselines(keep) if keep is not None else []
    kept = list(asked)
    for text in [text for text in dict.fromkeys(found) if text not in asked]:
        try:
            reports = runner.reports(text, pilot)
        except ValueError as error:
            notes.append(f"baseline {text} was left out: {error}")
        else:
            if any(reports):
                kept.append(text)
            else:
                notes.append(f"baseline {text} was left out: it failed on all of the first {len(pilot)} questions")
    return kept


def answers(
    runner: Runner,
    task: Task,
    finished: Mapping[str, AbstractSet[str]],
    samples: Iterator[Sample],
    pilot: Sequence[Prompt],
) -> Iterator[tuple[str, Record]]:
    """Answer what is not answered yet; plans take turns, and another one begins each time.

    Args:
        runner: the model.
        task: the data set.
        finished: every plan, with the ids of the samples it has answered.
        samples: of one shard.
        pilot: prompts to warm up with before the first question that is timed; empty if this was done.

    Yields:
        A plan and its answer to one sample.
    """
    warm = runner.batch > 1 or not pilot
    turns: Iterator[_Turn] = _turns(runner, finished, samples)
    if runner.batch > 1:
        # Preparing beside the model would disturb the times of single questions; those of batches are not compared.
        turns = prefetched(turns, lambda turn: turn, ahead=1)
    plans = list(finished)
    for number, (groups, prepared) in enumerate(turns):
        for plan in plans[number % len(plans) :] + plans[: number % len(plans)]:
            missing = [tuple(s for s in group if s.sample_id not in finished[plan]) for group in groups]
            prompts = []
            for group in filter(None, missing):
                key = tuple(sample.sample_id for sample in group)
                if key not in prepared:
                    prepared[key] = runner.prompts(group)
                prompts += prepared[key]
            if prompts and not warm:
                _warm_up(runner, plans, pilot)
                warm = True
            for record in runner.answer(task, plan, prompts):
                yield plan, record


def _turns(runner: Runner, finished: Mapping[str, AbstractSet[str]], samples: Iterator[Sample]) -> Iterator[_Turn]:
    """Yield the questions of one turn, and what is prepared of them for all plans together."""
    groups = batches(samples, runner.batch)
    while turn := list(itertools.islice(groups, _TURN if runner.batch == 1 else 1)):
        prepared = {}
        for group in turn:
            key = tuple(sample.sample_id for sample in group)
            if any(done.isdisjoint(key) for done in finished.values()):
                prepared[key] = runner.prompts(group)
        yield turn, prepared


def _warm_up(runner: Runner, plans: Sequence[str], pilot: Sequence[Prompt]) -> None:
    prompts = list(itertools.islice(itertools.cycle(pilot), WARMUP))
    for plan in plans:
        runner.reports(plan, prompts)


@contextmanager
def watching(progress: bool | Callable[[Progress], None]) -> Iterator[Callable[[Progress], None] | None]:
    """Turn ``progress`` into what is called after every answer."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        from tqdm.auto import tqdm

        with tqdm(unit="question") as bar:

            def show(state: Progress) -> None:
                bar.total = state.total
                bar.set_description(f"{state.task}, {state.plan}", refresh=False)
                bar.update(state.done - bar.n)

            yield show
