"""One decode step, and how it is made to run without Python: compiled, and captured where there is a GPU."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.compiled_states import States, StepCache
from mmfast.adapters.twin import fingerprint, twin_of

logger = logging.getLogger(__name__)

_KEPT = 4
"""Shapes of prompts whose states are kept for the next prompt of the same shape."""
_COMPILATIONS = 64
"""How often a step may be compiled for models and shapes that differ before it is left as it is."""
_WARM_UP = 3
"""Runs before a capture, in which libraries reserve what they need."""
_WITHOUT = ("uncompiled", "without a graph of the GPU")
"""What is missing after each failure."""

Run = Callable[[], None]
"""Runs a step on the states it was made for."""
StepFunction = Callable[..., None]
"""A step on any states."""


def read_token(twin: Any, adapter: Adapter, states: States, frequencies: Tensor | None) -> None:
    """Read one token and leave the logits that follow in the states; nothing but tensors decides anything."""
    cache = StepCache(adapter, states, frequencies)
    output = twin(
        input_ids=states.token,
        # Layers take their own; this one tells the decoder that there is nothing to make.
        attention_mask=cache.masks[0],
        position_ids=states.positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    states.logits.copy_(output.logits[:, -1])
    states.positions.add_(1)
    states.place.add_(1)
    states.fill.add_(1)


def read_and_choose(twin: Any, adapter: Adapter, states: States, frequencies: Tensor | None) -> None:
    """Read one token and choose the likeliest to follow; rows that have ended are filled up."""
    read_token(twin, adapter, states, frequencies)
    token = states.logits.argmax(dim=-1)
    if states.ends is not None:
        token = torch.where(states.unfinished, token, states.padding)
        states.unfinished.logical_and_((token[:, None] != states.ends).all(dim=-1))
    states.answer.index_copy_(1, states.fill - 1, token[:, None])
    states.token.copy_(token[:, None])


class Stepper:
    """The steps of one model, made when they are first needed and kept.

    Args:
        adapter: the adapter of the model.
        calibrated: attention has to know how many tokens each merged one stands for.

    Attributes:
        seconds: what making steps has taken so far.
    """

    def __init__(self, adapter: Adapter, *, calibrated: bool) -> None:
        self.adapter, self.calibrated = adapter, calibrated
        self.seconds = 0.0
        self._failures: list[str] = []
        self._of: tuple[Any, ...] = ()
        self._twin: Adapter = adapter
        self._made: OrderedDict[tuple[Any, ...], tuple[States, Run]] = OrderedDict()
        self._pool: Any = None

    @property
    def failure(self) -> str:
        """Why steps do not run as they should; empty while they do."""
        return "; ".join(self._failures)

    def renew(self) -> None:
        """Forget what was made of a model that has changed since."""
        now = fingerprint(self.adapter.model)
        if now != self._of:
            self._of = now
            self._made.clear()
            self._twin = type(self.adapter)(twin_of(self.adapter.model))

    def ready(self, key: tuple[Any, ...], make: Callable[[], States], *, choose: bool) -> tuple[States, Run]:
        """Return states, and what runs a step on them.

        Args:
            key: what decides whether states made before can be used again.
            make: makes states.
            choose: the step chooses the next token too.
        """
        key = (*key, choose)
        found = self._made.pop(key, None)
        if found is None:
            with steadily():
                states = make()
                found = states, self._prepared(read_and_choose if choose else read_token, states)
        self._made[key] = found
        while len(self._made) > _KEPT:
            self._made.popitem(last=False)
        return found

    def _prepared(self, step: StepFunction, states: States) -> Run:
        """Return what runs a step on these states from now on: the one place that chooses how.

        The step has run before this returns, so that what the states hold then is of no use.
        """
        begin = time.perf_counter()
        frequencies = self._twin.rotary_frequencies() if self.calibrated else None
        arguments = (self._twin.model, self._twin, states, frequencies)
        for tensor, axis in states.resizable():
            torch._dynamo.mark_dynamic(tensor, axis)
        ways = [(compiled, _tried)]
        if states.token.is_cuda:
            ways = [(compiled, self._captured), (_as_it_is, self._captured)]
        try:
            while len(self._failures) < len(ways):
                make, settle = ways[len(self._failures)]
                try:
                    return settle(partial(make(step), *arguments), states)
                except Exception as error:
                    # Whatever a compiler stumbles over: the step is right without it, and says so if it is not.
                    self._failures.append(_in_a_line(error))
                    logger.warning("decode steps run %s: %s", _WITHOUT[len(self._failures) - 1], self._failures[-1])
            return _tried(partial(step, *arguments), states)
        finally:
            self.seconds += time.perf_counter() - begin

    def _captured(self, run: Run, states: States) -> Run:
        """Record what a step asks of the GPU, and return what asks for the same again.

        What is compiled, and what libraries reserve when they first run, must be there before; a side stream keeps
        it out of the work of others. All graphs share one pool of memory, since they never run at the same time.
        """
        with torch.cuda.device(states.token.device):
            return self._recorded(run)

    def _recorded(self, run: Run) -> Run:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        torch.cuda.synchronize()
        replay: Run = graph.replay
        return replay


@contextmanager
def steadily() -> Iterator[None]:
    """Run steps in one mode, whatever mode the caller is in: they are compiled for it, and buffers outlive a call."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def compiled(step: StepFunction) -> StepFunction:
    """Compile a step; lengths that depend on the prompt do not make another one."""
    made = torch.compile(step, fullgraph=True)

    def run(*arguments: Any) -> None:
        # The bound is there for programs that are compiled at every call; here each one stands for a model or a batch.
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
            made(*arguments)

    return run


def _as_it_is(step: StepFunction) -> StepFunction:
    return step


def _tried(run: Run, states: States) -> Run:
    run()
    return run


def _in_a_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
