"""Between attention and the cache: evict, pack and retrieve what a prompt has left there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.attention import Capture, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level
from mmfast.adapters.kernel_attention import answer, arm_step, runs
from mmfast.adapters.kv_steps import Selecting, Steps, gather_memory
from mmfast.adapters.masks import gather_positions
from mmfast.adapters.packed import PackedLayer
from mmfast.adapters.reading import capture_attention, switch_on_tap
from mmfast.adapters.recorder import Recorder
from mmfast.kv.base import Adjuster, CacheMethod, Evictor, Forgetter, ModelEvictor, Packer, Retriever
from mmfast.kv.cache import PromptBook
from mmfast.kv.entries import Entries, Retained, Rotation
from mmfast.token_pruning.attention import AttentionView


@dataclass(frozen=True)
class _Kinds:
    """What stands where in a padded prompt, ``[S]`` each: is it visual, of which media, of which frame."""

    visual: Tensor
    media: Tensor
    frame: Tensor


@dataclass(frozen=True)
class _Run:
    """One layer that has just run.

    Attributes:
        index: of the layer.
        capture: what it attended with, if asked for.
        tables: cosines and sines ``[B or 1, K, r]`` of its tokens.
        positions: ``[B or 1, K]`` their position ids, or one such per dimension; None where not known.
        hidden: its input, for device and dtype.
    """

    index: int
    capture: Capture | None
    tables: tuple[Tensor, Tensor]
    positions: Tensor | None
    hidden: Tensor


class CacheRunner:
    """Carry out the methods of the cache.

    Args:
        adapter: the adapter of the model.
        methods: those of the plan.
        recorder: takes the times of selections.
        late: wait for the end of the prompt even where layers could decide at once.
    """

    def __init__(self, adapter: Adapter, methods: tuple[CacheMethod, ...], recorder: Recorder, *, late: bool) -> None:
        self.adapter = adapter
        self.recorder = recorder
        self.late = late
        self.evictor = next((method for method in methods if isinstance(method, Evictor)), None)
        self.adjusters = [method for method in methods if isinstance(method, Adjuster)]
        self.retriever = next((method for method in methods if isinstance(method, Retriever)), None)
        self.packer = next((method for method in methods if isinstance(method, Packer)), None)
        self.forgetter = next((method for method in methods if isinstance(method, Forgetter)), None)
        self.needs = frozenset().union(*(method.needs for method in methods)) if methods else frozenset()
        # What keeps everything is no reason to touch a prompt.
        self.any = any(getattr(method, "keep", None) != 1.0 for method in methods if not isinstance(method, Adjuster))

    @property
    def reads_attention(self) -> bool:
        """Whether the decoder has to attend through the tap in some call."""
        return "attention" in self.needs or self.retriever is not None or self._steps

    @property
    def _steps(self) -> bool:
        return self.evictor is not None and self.evictor.decodes

    # ------------------------------------------------------------------ arming

    def arm(self, inner: Inner) -> None:
        """Hook the layers whose caches change in this call."""
        if not self.any or inner.cache is None:
            return
        if inner.length == 1 and self.forgetter is not None:
            layer = self.adapter.layers[self.forgetter.first_layer(self.adapter.shape.layers)]
            handle = layer.register_forward_pre_hook(self._before_forgetting(inner, self.forgetter), with_kwargs=True)
            inner.undo.append(handle.remove)
        if inner.length > 1 and any(inner.segments):
            if "attention" in self.needs:
                switch_on_tap(self.adapter, inner)
            inner.tables["kinds"] = [_kinds(parts, inner.length) for parts in inner.segments]
            for index, layer in self._layers(inner):
                if "attention" in self.needs:
                    self._capture(inner, index)
                handle = layer.register_forward_hook(self._after_prompt(inner, index), with_kwargs=True)
                inner.undo.append(handle.remove)
        elif inner.length == 1 or inner.block is not None:
            for index, layer in self._layers(inner):
                self._arm_step(inner, index, layer)

    def _arm_step(self, inner: Inner, index: int, layer: nn.Module) -> None:
        """Prepare one layer for tokens that follow a prompt."""
        selects = self.selects(inner, index)
        if selects is not None:
            selecting = Selecting(selects, inner, index, self.adapter.shape.layers)
            if inner.block is None and runs("gather_decode", self.adapter, inner.cache.layers[index].keys):
                answer(self.adapter, inner, index, selecting)
            else:
                switch_on_tap(self.adapter, inner)
                inner.undo.append(watch(self.adapter.attention(layer), selecting))
        elif inner.length == 1:
            arm_step(self.adapter, inner, index)
        if self._steps and inner.cache.layers[index].prompts is not None:
            switch_on_tap(self.adapter, inner)
            self._capture(inner, index)
            inner.undo.append(layer.register_forward_hook(self._after_step(inner, index)).remove)

    def selects(self, inner: Inner, index: int) -> Retriever | None:
        """Return the method that chooses what tokens after a prompt read in a layer, if one does."""
        cached = inner.cache.layers[index]
        acts = self.retriever is not None and index >= self.retriever.dense_layers and not cached.is_sliding
        return self.retriever if acts and cached.prompts is not None else None

    def _layers(self, inner: Inner) -> list[tuple[int, nn.Module]]:
        """Layers whose cache may change; what slides throws away by itself."""
        return [(i, layer) for i, layer in enumerate(self.adapter.layers) if not inner.cache.layers[i].is_sliding]

    def _capture(self, inner: Inner, index: int) -> None:
        def note(capture: Capture) -> None:
            if index in inner.attending:
                # Where tokens are shown but do not attend, fewer attend than are read.
                level = inner.attending[index]
                capture.slots, capture.real = level.slots, level.real
            inner.tables["kv capture", index] = capture

        capture_attention(self.adapter, inner, index, note)

    # ------------------------------------------------------------ after a prompt

    def _after_prompt(self, inner: Inner, index: int) -> Any:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            run = _Run(
                index,
                inner.tables.pop(("kv capture", index), None),
                kwargs["position_embeddings"],
                kwargs.get("position_ids"),
                args[0] if args else kwargs["hidden_states"],
            )
            if self.late:
                inner.tables.setdefault("kv late", []).append(run)
            else:
                self._prompt_read(inner, run)

        return after

    def finish(self, inner: Inner) -> None:
        """Decide what had to wait for the last layer."""
        self._forget(inner)
        self._settle(inner)
        if inner.cache is not None and "kv floor" in inner.tables:
            # One layer cannot go back alone.
            for layer in inner.cache.layers:
                layer.floor = max(layer.floor, inner.tables["kv floor"])

    def _settle(self, inner: Inner) -> None:
        for run in inner.tables.pop("kv late", []):
            self._prompt_read(inner, run)
        seen = inner.tables.pop("kv observed", None)
        if seen is None or not isinstance(self.evictor, ModelEvictor):
            return
        begin = self.recorder.watch.mark()
        rows: dict[int, list[tuple[_Run, Tensor, Entries, Any]]] = {}
        for run, row, places, entries, observation in seen:
            rows.setdefault(row, []).append((run, places, entries, observation))
        choices: dict[int, dict[int, tuple[Tensor, Retained]]] = {}
        with torch.no_grad():
            for row, layers in rows.items():
                settled = self.evictor.settle([observation for *_, observation in layers])
                for (run, places, entries, _), retained in zip(layers, settled, strict=True):
                    if retained is not None:
                        adjusted = self._adjusted(inner, run, row, entries, retained)
                        choices.setdefault(run.index, {})[row] = (places, adjusted)
            for run in {id(run): run for run, *_ in seen}.values():
                self._carry_out(inner, run, choices.get(run.index, {}))
        inner.selection_marks.append((begin, self.recorder.watch.mark()))

    def _prompt_read(self, inner: Inner, run: _Run) -> None:
        begin = self.recorder.watch.mark()
        with torch.no_grad():
            choices: dict[int, tuple[Tensor, Retained]] = {}
            waiting = False
            for row, places, entries in self._prompts(inner, run):
                if isinstance(self.evictor, ModelEvictor):
                    waiting = True
                    observed = inner.tables.setdefault("kv observed", [])
                    # The tensors of attention live no longer than the layer.
                    bare = replace(entries, attention=None)
                    observed.append((run, row, places, bare, self.evictor.observe(entries)))
                elif self.evictor is not None:
                    retained = self.evictor(entries)
                    if retained is not None:
                        choices[row] = (places, self._adjusted(inner, run, row, entries, retained))
                if self.retriever is not None and self.evictor is None:
                    self.retriever.prepare(entries)
            if not waiting:
                self._carry_out(inner, run, choices)
        inner.selection_marks.append((begin, self.recorder.watch.mark()))

    def _adjusted(self, inner: Inner, run: _Run, row: int, entries: Entries, retained: Retained) -> Retained:
        for adjuster in self.adjusters:
            retained = adjuster.adjust(entries, retained)
            if adjuster.compacts:
                (kept,) = set(retained.counts)
                inner.tables.setdefault(("kv shift", run.index), {})[row] = len(entries) - kept
        return retained

    def _carry_out(self, inner: Inner, run: _Run, choices: Mapping[int, tuple[Tensor, Retained]]) -> None:
        """Change the cache of one layer."""
        layer = inner.cache.layers[run.index]
        end = inner.length if inner.prompt_end is None else inner.prompt_end + 1
        layer.retain([choices.get(row) for row in range(run.hidden.shape[0])])
        if choices or self.packer is not None or self.retriever is not None:
            inner.tables["kv floor"] = inner.seen + end
        shifts: dict[int, int] | None = inner.tables.pop(("kv shift", run.index), None)
        if shifts:
            shift = torch.tensor([shifts.get(row, 0) for row in range(run.hidden.shape[0])], device=run.hidden.device)
            layer.shift = shift if layer.shift is None else layer.shift + shift.to(layer.shift.device)
            layer.renumbered = hash((layer.renumbered, tuple(shift.tolist())))
        if self.retriever is not None and self.evictor is not None:
            for *_, entries in self._prompts(inner, run, after=True):
                self.retriever.prepare(entries)
        if self.packer is not None:
            self._pack(inner, run, self.packer)

    def _pack(self, inner: Inner, run: _Run, packer: Packer) -> None:
        layer = inner.cache.layers[run.index]
        if not isinstance(layer, PackedLayer):
            layer = inner.cache.layers[run.index] = PackedLayer(packer, layer)
        after = 0 if inner.prompt_end is None else inner.length - inner.prompt_end - 1
        layer.pack([(row, entries) for row, _, entries in self._prompts(inner, run, after=True)], after)

    def _prompts(self, inner: Inner, run: _Run, *, after: bool = False) -> Iterator[tuple[int, Tensor, Entries]]:
        """Go through the prompts that have images or videos.

        Args:
            inner: the call.
            run: the layer.
            after: entries have been evicted since the layer ran.

        Yields:
            The row, ``[n]`` int64 places of the entries of its prompt among those stored, and the entries.
        """
        layer = inner.cache.layers[run.index]
        keys, values = layer.keys, layer.values
        real = layer.real_entries().any(dim=1).cpu()
        slots = layer.slots.cpu() - inner.seen
        end = inner.length if inner.prompt_end is None else inner.prompt_end + 1
        if layer.prompts is None:
            layer.prompts = [None] * keys.shape[0]
        for row, kinds in enumerate(inner.tables["kinds"]):
            if kinds is None:
                continue
            places = (real[row] & (slots[row] >= 0) & (slots[row] < end)).nonzero().squeeze(-1)
            own = slots[row, places]
            if not after:
                layer.prompts[row] = PromptBook(len(places), inner.seen + end)
            columns = places.to(keys.device)
            whole = len(places) == keys.shape[2]
            yield (
                row,
                columns,
                Entries(
                    keys[row] if whole else keys[row][:, columns],
                    values[row] if whole else values[row][:, columns],
                    kinds.visual[own].to(keys.device),
                    kinds.media[own].to(keys.device),
                    kinds.frame[own].to(keys.device),
                    run.index,
                    self.adapter.shape.layers,
                    attention=self._last_queries(run, row, columns, keys, values)
                    if after
                    else self._attention(inner, run, row, places, own),
                    rotation=None if after else self._rotation(inner, run, row, own),
                    output_weight=self._output_weight(run.index),
                    memory=layer.prompts[row].memory,
                ),
            )

    def _output_weight(self, index: int) -> Tensor | None:
        if "output_projection" not in self.needs:
            return None
        return self.adapter.output_projection(self.adapter.layers[index]).weight.detach()

    def _rotation(self, inner: Inner, run: _Run, row: int, own: Tensor) -> Rotation | None:
        if "rotation" not in self.needs:
            return None
        level = inner.reads_at(run.index)
        cos, sin = (table[row if table.shape[0] > 1 else 0] for table in run.tables)
        # A layer that only some tokens entered got the tables of these.
        order = _order(level.slots[row].cpu(), own)
        layer, hidden = self.adapter.layers[run.index], run.hidden[row : row + 1]
        positions = run.positions
        if cos.shape[0] != level.length:
            # Tokens are shown here without taking part, and the layer got the tables of those that do.
            positions = _entered(inner.tables["positions"], level)
            cos, sin = (table[row] for table in self.adapter.rotary(layer, run.hidden, positions))
        order = order.to(cos.device)
        first, following = _ends(positions, row, order)

        def at(places: Tensor) -> tuple[Tensor, Tensor]:
            places = torch.where(places < len(own), places + first, places - len(own) + following)
            tables = self.adapter.rotary(layer, hidden, self.adapter.text_positions(places))
            return tables[0][0], tables[1][0]

        return Rotation(cos[order], sin[order], at)

    def _attention(self, inner: Inner, run: _Run, row: int, places: Tensor, own: Tensor) -> AttentionView | None:
        capture = run.capture
        if capture is None or capture.key is None or capture.query is None:
            return None
        attending = capture.slots[row].cpu()
        if capture.real is not None:
            # Padding points at tokens that do not attend.
            attending = attending.masked_fill(~capture.real[row].cpu(), -1)
        queries = len(attending)
        stored = capture.key.shape[2]
        order = _order(attending, own)
        if inner.cache.layers[run.index].stored != stored:
            # The cache was cut since the layer ran: what is left is found where it was then.
            return capture.view(row, order)
        past = torch.arange(stored)[inner.cache.layers[run.index].real_entries()[row].any(dim=0).cpu()[:stored]]
        # Drafted tokens come after the prompt and are no past of it.
        past = past[past < places[0]]
        if queries == len(own) and stored == len(own) and not len(past):
            return capture.view(row, None)
        if bool((order >= 0).all()):
            return capture.view(row, order, past)
        return _with_silent(capture, row, order, places, past)

    @staticmethod
    def _last_queries(run: _Run, row: int, columns: Tensor, keys: Tensor, values: Tensor) -> AttentionView | None:
        """What is left of a prompt after an eviction, with as many of its last queries."""
        if run.capture is None or run.capture.query is None:
            return None
        query = run.capture.query[row][:, -columns.numel() :]
        return AttentionView(query, keys[row][:, columns], values[row][:, columns], run.capture.scaling)

    # -------------------------------------------------------------- decode steps

    def _before_forgetting(self, inner: Inner, method: Forgetter) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            with torch.no_grad():
                inner.tables["remembered"] = method.remember(hidden[:, 0])

        return before

    def _forget(self, inner: Inner) -> None:
        """Take new tokens that are not worth remembering out again, in prompts that have images or videos."""
        remembered: Tensor | None = inner.tables.pop("remembered", None)
        if remembered is None or self.forgetter is None or inner.cache is None:
            return
        for layer in inner.cache.layers[self.forgetter.first_layer(self.adapter.shape.layers) :]:
            if layer.is_sliding or layer.visual is None:
                continue
            gone = ~remembered.cpu() & layer.visual.cpu()
            if bool(gone.any()):
                keep = layer.real_entries().clone()
                keep[gone.to(keep.device), :, -1] = False
                layer.compact(keep)
                if not layer.holes:
                    layer.holes = True
                    inner.tables["kv floor"] = max(layer.floor, layer.seen - 1)

    def _after_step(self, inner: Inner, index: int) -> Any:
        def after(layer: nn.Module, args: Any, output: Any) -> None:
            evictor, cached = self.evictor, inner.cache.layers[index]
            capture = inner.tables.pop(("kv capture", index), None)
            if evictor is None or capture is None or capture.query is None or cached.prompts is None:
                return
            real = cached.real_entries()
            keep = real.clone()
            options = {"scaling": capture.scaling, "softcap": capture.softcap}
            depth = self.adapter.shape.layers
            steps = Steps(cached, index, depth, capture.query, cached.keys, cached.values, options)
            with torch.no_grad():
                for row, book in enumerate(cached.prompts):
                    if book is None:
                        continue
                    places, step = steps.of(row)
                    stays = evictor.step(step)
                    if stays is not None:
                        keep[row][:, places] &= stays
                        gather_memory(book, keep[row][:, places])
                if not torch.equal(keep, real):
                    cached.compact(keep)
                    inner.tables["kv floor"] = cached.seen

        return after


def _with_silent(capture: Capture, row: int, order: Tensor, places: Tensor, past: Tensor) -> AttentionView:
    """Attention of a prompt some of whose tokens are looked at without looking themselves.

    Args:
        capture: what was read.
        row: row of the batch.
        order: ``[n]`` place of each token among those that attend; -1 for the silent ones.
        places: ``[n]`` place of each token among the keys.
        past: ``[m]`` columns that stand for the past.
    """
    if capture.query is None or capture.key is None or capture.value is None or capture.mask is None:
        raise RuntimeError("a layer in which some tokens do not attend came without a mask")
    device = capture.query.device
    order, columns = order.to(device), torch.cat([past, places]).to(device)
    known = order >= 0
    query = capture.query[row][:, order.clamp_min(0)] * known[:, None]
    mask = capture.mask[row if capture.mask.shape[0] > 1 else 0, 0]
    visible = mask if mask.dtype == torch.bool else mask == 0
    own = visible[order.clamp_min(0)][:, columns].clone()
    # A row that sees nothing has no softmax; what silent tokens give is taken out afterwards.
    own[~known] = True
    key, value = capture.key[row][:, columns], capture.value[row][:, columns]
    return AttentionView(query, key, value, capture.scaling, capture.softcap, own, ~known)


def _entered(positions: Tensor, level: Level) -> Tensor:
    """Return the position ids of a level, given those with which the decoder was entered."""
    if level.positions is not None:
        return level.positions
    return positions if level.entry is None else gather_positions(positions, level.entry.to(positions.device))


def _ends(positions: Tensor | None, row: int, order: Tensor) -> tuple[int, int]:
    """Return the position of the first token of a prompt, and the one after its last.

    Args:
        positions: ``[B or 1, K]``, or with one such per dimension; None = as the places.
        row: row of the batch.
        order: ``[n]`` places of the prompt's tokens among the K.
    """
    if positions is None:
        return 0, order.numel()
    own = positions[..., row if positions.shape[-2] > 1 else 0, :][..., order.to(positions.device)]
    return int(own[..., 0].min()), int(own.max()) + 1


def _kinds(parts: list[Any], length: int) -> _Kinds | None:
    """Describe one padded prompt; None where it has no images or videos."""
    if not parts:
        return None
    media = torch.full((length,), -1, dtype=torch.int64)
    frame = torch.full((length,), -1, dtype=torch.int64)
    for number, part in enumerate(parts):
        slots = part.slots.cpu()
        media[slots] = number
        # A token that closes a video belongs to its last frame.
        frame[slots] = torch.where(part.layout.frame < 0, part.layout.frame.max(), part.layout.frame).cpu()
    return _Kinds(media >= 0, media, frame)


def _order(slots: Tensor, wanted: Tensor) -> Tensor:
    """Find each of ``wanted`` in ``slots`` (the last where it occurs twice); -1 where it is not."""
    if slots.numel() == wanted.numel() and torch.equal(slots, wanted):
        return torch.arange(slots.numel())
    # Padding points at dropped tokens, so a slot may occur twice; the real one is the later.
    place = {slot: index for index, slot in enumerate(slots.tolist())}
    return torch.tensor([place.get(slot, -1) for slot in wanted.tolist()], dtype=torch.int64)
