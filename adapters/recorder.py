"""Collect what the hooks see into a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level
from mmfast.decoding import Compilation, Drafting
from mmfast.kv.cache import LogicalLength
from mmfast.plan import Plan
from mmfast.report import LayerWork, MediaRecord, Report, Stopwatch, peak_memory


class Recorder:
    """Book tokens, times and bytes of the last prompt with images or videos.

    Args:
        adapter: the adapter of the model.
        plan: the plan.
    """

    def __init__(self, adapter: Adapter, plan: Plan) -> None:
        self.adapter = adapter
        self.plan = plan
        self.device = next(adapter.model.parameters()).device
        self.watch = Stopwatch(self.device)
        self._vision: list[tuple[Any, Any]] = []
        self._selection: list[tuple[Any, Any]] = []
        self._prefill: tuple[Any, Any] | None = None
        self._vision_inside = 0
        self.steps = 0
        self._last_step: Any = None
        self._begin: Any = None
        self._inner: Inner | None = None
        self._levels: list[Level] = []
        self._work: list[list[LayerWork]] = []
        self._kv_bytes = 0
        self._reread = self.reread = 0
        self.drafting: Drafting | None = None
        self.compilation: Compilation | None = None

    def add_vision(self, begin: Any, end: Any) -> None:
        """Book one run of the vision tower."""
        if self._begin is None and self._prefill is not None:
            # The tower runs ahead of the next prompt: what is booked belongs to the last one.
            self._vision, self._prefill = [], None
        if self._begin is not None:
            self._vision_inside += 1
        self._vision.append((begin, end))

    def begin_prefill(self) -> None:
        """Start a new prompt."""
        if self._prefill is not None:
            self._vision = []
        self._selection, self._prefill, self.steps, self._last_step = [], None, 0, None
        self._vision_inside = 0
        self._inner, self._levels, self._kv_bytes = None, [], 0
        self._reread, self.reread = self.reread, 0
        self._begin = self.watch.mark()

    def begin_step(self) -> None:
        """Start a forward pass that continues a prompt."""
        if self._begin is None:
            self.steps += 1

    def note_uncompiled(self, reason: str, *, asked: bool = True) -> None:
        """Book why decode steps do not run compiled, where that was asked for."""
        self.compilation = Compilation(reason) if asked else None

    def note_steps(self, count: int) -> None:
        """Book forward passes that continued a prompt and have just ended, without a call of the outer model."""
        self.steps += count
        if count and self._prefill is not None:
            self._last_step = self.watch.mark()

    def end_call(self, *, prefill: bool, cache: Any) -> None:
        """End a forward pass of the outer model, which left this cache behind."""
        if prefill and self._begin is not None:
            self._prefill = (self._begin, self.watch.mark())
            self._kv_bytes = _cache_bytes(cache)
            self._begin = None
        elif self._prefill is not None:
            self._last_step = self.watch.mark()

    def note_full(self, inner: Inner, valid: Tensor) -> None:
        """Book a prompt that runs untouched."""
        batch, length = valid.shape
        slots = torch.arange(length, device=valid.device).expand(batch, length)
        inner.levels[0] = Level(slots, None if bool(valid.all()) else valid, whole=True)
        self._finish(inner)

    def note_pruned(self, inner: Inner) -> None:
        """Book a prompt that was shortened."""
        if inner.segments:
            self._finish(inner)

    def _finish(self, inner: Inner) -> None:
        self._selection = inner.selection_marks
        depth = range(self.adapter.shape.layers)
        self._levels = [inner.level_at(layer) for layer in depth]
        self._work = [_work(inner, layer) for layer in depth]
        # Only what the report needs: no cache, features or gathered tables are held on to.
        self._inner = Inner(inner.length, {}, segments=[[part.bare() for part in parts] for parts in inner.segments])

    def report(self) -> Report:
        """Build the report."""
        report = Report(
            self.plan.to_text(), type(self.adapter.model).__name__, self.adapter.shape, device=self.device.type
        )
        report.drafting, report.compilation = self.drafting, self.compilation
        if self._inner is None or not self._levels:
            report.note = "no prompt with images or videos has been run yet"
            return report
        first, last = self._levels[0], self._levels[-1]
        for row, parts in enumerate(self._inner.segments):
            entered_slots, left_slots = _real_slots(first, row), _real_slots(last, row)
            for part in parts:
                slots = part.slots.cpu()
                entered = torch.isin(slots, entered_slots).nonzero().squeeze(-1)
                left = torch.isin(slots, left_slots).nonzero().squeeze(-1)
                report.media.append(
                    MediaRecord(
                        row,
                        part.layout.modality,
                        len(slots),
                        len(entered),
                        len(left),
                        entered,
                        left,
                        part.layout,
                        *part.frames(),
                        layers_alive=_layers_alive(self._levels, row, slots),
                    )
                )
        report.work = [list(layers) for layers in zip(*self._work, strict=True)]
        for row, entered_tokens in enumerate(first.counts()):
            visual = sum(item.entered for item in report.media if item.row == row)
            report.text_tokens.append(entered_tokens - visual)
        report.seconds = self._seconds()
        report.decode_steps = self.steps
        report.kv_bytes = self._kv_bytes
        report.reread_tokens = self._reread
        report.kv_value_bytes = self.adapter.decoder.dtype.itemsize
        report.peak_bytes = peak_memory(self.device)
        return report

    def _seconds(self) -> dict[str, float]:
        vision = [self.watch.seconds(*marks) for marks in self._vision]
        selection = sum(self.watch.seconds(*marks) for marks in self._selection)
        prefill = decode = 0.0
        if self._prefill is not None:
            inside = sum(vision[len(vision) - self._vision_inside :])
            prefill = max(0.0, self.watch.seconds(*self._prefill) - inside - selection)
            if self._last_step is not None:
                decode = self.watch.seconds(self._prefill[1], self._last_step)
                if self.compilation is not None:
                    decode = max(0.0, decode - self.compilation.seconds)
        return {"vision": sum(vision), "selection": selection, "prefill": prefill, "decode": decode}


def _work(inner: Inner, layer: int) -> list[LayerWork]:
    """Count, row by row, what one layer works on."""
    alive = inner.level_at(layer).counts()
    attending = inner.attending[layer].counts() if layer in inner.attending else alive
    shown = inner.reads_at(layer).counts()
    fed = alive if layer in inner.fed else attending
    return [LayerWork(*counts) for counts in zip(attending, shown, fed, strict=True)]


def _layers_alive(levels: list[Level], row: int, slots: Tensor) -> Tensor:
    """Count, for each slot of one image or video, the layers that had it at hand."""
    alive = torch.zeros(slots.shape, dtype=torch.long)
    # Many layers share one level: it is looked up once.
    for level in {id(level): level for level in levels}.values():
        here = sum(other is level for other in levels)
        alive += here * torch.isin(slots, _real_slots(level, row))
    return alive


def _real_slots(level: Level, row: int) -> Tensor:
    slots = level.slots[row]
    return (slots if level.real is None else slots[level.real[row]]).cpu()


def _cache_bytes(cache: Any) -> int:
    """Add up what the tensors of a cache really take: each storage once, whatever looks at it."""
    if cache is None:
        return 0
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in _held(layer)
    }
    return sum(storages.values())


def _held(layer: Any) -> list[Tensor]:
    if isinstance(layer, LogicalLength):
        return layer.storage()
    found = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
