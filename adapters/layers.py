"""Inside the decoder: drop tokens between layers and keep every table in step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.base import Adapter
from mmfast.adapters.bypass import Bypasser
from mmfast.adapters.cache import reference_layer
from mmfast.adapters.call import Inner, Level, announcement, compact_positions
from mmfast.adapters.compression import forget_hidden
from mmfast.adapters.kernel_attention import answered, arm_waiting
from mmfast.adapters.masks import gather_positions, gather_rows, gather_table, head_mask, layer_mask, pack
from mmfast.adapters.reading import Reader, Reading, replay, switch_on_tap
from mmfast.adapters.recorder import Recorder
from mmfast.adapters.teaching import hide_softly, refuse_unteachable, watch_parts
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerEvent
from mmfast.token_pruning.weights import Learner, Lesson, MaskLearner


class LayerRunner:
    """Arm layer hooks for the calls that need them, and only for those.

    Args:
        adapter: the adapter of the model.
        dropper: the method that drops inside the language model, if any.
        bypass: the method that lets tokens go around layers, if any.
        recorder: takes the times of selections.
    """

    def __init__(
        self, adapter: Adapter, dropper: LayerDropper | None, bypass: LayerBypass | None, recorder: Recorder
    ) -> None:
        self.adapter = adapter
        self.dropper = dropper
        self.reader = None if dropper is None else Reader(adapter, dropper)
        self.bypasser = None if bypass is None else Bypasser(adapter, bypass, recorder)
        self.recorder = recorder
        self.lesson: Lesson | None = None
        """What methods are to know while the model is trained."""

    @property
    def learners(self) -> dict[str, Learner]:
        """Name -> method that has learned parts to train."""
        inside: list[Method] = [] if self.dropper is None else [self.dropper]
        inside += [] if self.bypasser is None else [self.bypasser.method]
        return {method.name: method for method in inside if isinstance(method, Learner)}

    def learned(self) -> nn.ModuleDict:
        """Return the learned parts of the methods."""
        shape, device = self.adapter.shape, next(self.adapter.decoder.parameters()).device
        return nn.ModuleDict(
            {name: method.learned(shape.hidden, shape.layers, device) for name, method in self.learners.items()}
        )

    @property
    def bypassed(self) -> list[int]:
        """Layers around which tokens may go."""
        return [] if self.bypasser is None else self.bypasser.layers

    # ------------------------------------------------------------------- cache

    def announce(self, inner: Inner) -> None:
        """Tell every cache layer how many logical tokens this call brings."""
        if inner.cache is None:
            return
        visual = torch.tensor([sum(totals) > 0 for totals in inner.media_totals], dtype=torch.bool)
        for layer in inner.cache.layers:
            layer.announced = announcement(inner, 0)
            if bool(visual.any()):
                layer.visual = visual if layer.visual is None else layer.visual | visual

    def add_shift(self, inner: Inner, shift: Tensor, first: int = 0) -> None:
        """Lower the positions of all later tokens, from layer ``first`` on."""
        if inner.cache is None:
            return
        for layer in inner.cache.layers[first:]:
            before = layer.shift
            layer.shift = shift if before is None else before + shift.to(before.device)
            layer.renumbered += first > 0

    # ------------------------------------------------------------------ arming

    def arm(self, inner: Inner, kwargs: Mapping[str, Any]) -> None:
        """Hook the layers this call must touch; ``disarm`` takes the hooks off again."""
        inner.lesson = self.lesson
        if inner.gates_learn:
            refuse_unteachable(self.adapter, inner)
        watch_parts(self.adapter, inner)
        routed = self.bypasser.arm(inner) if self.bypasser is not None else []
        requests = {e.layer: self.dropper.request(e) for e in inner.events.values()} if self.dropper else {}
        ahead = {request.layer for request in requests.values() if request is not None and not request.rotary}
        affected = self._affected(inner) | ahead | set(routed)
        touched = self.adapter.layers if affected or inner.deepstack else ()
        for index, layer in enumerate(touched):
            if index in affected:
                handle = layer.register_forward_pre_hook(self._pre_hook(inner, index), with_kwargs=True)
                inner.undo.append(handle.remove)
            if index in routed and self.bypasser is not None:
                handle = layer.register_forward_hook(self.bypasser.after_layer(inner, index))
                inner.undo.append(handle.remove)
            if index < len(inner.deepstack):
                handle = layer.register_forward_hook(self._deepstack_hook(inner, index))
                inner.undo.append(handle.remove)
        if not inner.gates_learn:
            arm_waiting(self.adapter, inner)
        if self.reader is not None:
            if any(requests.values()):
                switch_on_tap(self.adapter, inner)
            for event_layer, request in requests.items():
                self.reader.arm(inner, request, event_layer)

    def disarm(self, inner: Inner) -> None:
        """End the call: take off hooks, stop reading, drop announcements a failure left behind."""
        for undo in reversed(inner.undo):
            undo()
        inner.undo.clear()
        if inner.cache is not None:
            for layer in inner.cache.layers:
                layer.announced = None

    def truncate(self, inner: Inner) -> None:
        """Cut the caches of layers before an event down to its survivors, where the method wants that."""
        forget_hidden(inner)
        if self.dropper is None or inner.cache is None or not inner.events:
            return
        done: set[int] = set()
        # Survivors of a later event are survivors of an earlier one: the latest cut says it all.
        for event_layer, first, last in sorted(self.dropper.truncations(self.adapter.shape.layers), reverse=True):
            survivors = inner.level_at(event_layer)
            for index in range(first, last):
                before = inner.level_at(index)
                if before is survivors or index in done:
                    continue
                done.add(index)
                layer = inner.cache.layers[index]
                keep = torch.ones(before.slots.shape[0], layer.stored, dtype=torch.bool)
                for row, slots in enumerate(survivors.slots.cpu()):
                    alive = slots if survivors.real is None else slots[survivors.real[row].cpu()]
                    own = torch.isin(before.slots[row].cpu(), alive)
                    keep[row, -before.length :] = own if before.real is None else own & before.real[row].cpu()
                layer.narrow(*pack(keep))

    def _affected(self, inner: Inner) -> set[int]:
        """Layers whose input, mask or positions differ from what the decoder will hand them."""
        depth = self.adapter.shape.layers
        first_event = min(inner.events, default=depth)
        affected = set(range(first_event, depth))
        implementation = self.adapter.text_config._attn_implementation
        if "flash" in implementation and not inner.levels[0].whole:
            # Flash attention takes gaps in the positions for the seams of packed sequences.
            affected |= set(range(depth))
        if inner.cache is None:
            return affected
        layers = inner.cache.layers
        reference = reference_layer(inner.cache)
        unmasked = (
            inner.length == 1
            and implementation == "sdpa"
            and inner.levels[0].real is None
            # A mask made before the decoder fits one layer's cache only.
            and not self.adapter.masks_before_decoder
        )
        for index, layer in enumerate(layers):
            own = layer.is_sliding or layer.heads is not None or layer.bias is not None
            # One token that sees everything stored needs no mask, however much that is.
            plain = unmasked and layer.valid is None and reference.valid is None and _counts_alike(layer, reference)
            if own or (layer.history != reference.history and not plain):
                affected.add(index)
        return affected

    # ------------------------------------------------------------------- layers

    def _pre_hook(self, inner: Inner, index: int) -> Any:
        def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            new = dict(kwargs)
            event = inner.events.get(index)
            level = inner.level_at(index)
            self._tables(inner, index, level, layer, hidden, new, kwargs)
            if event is not None:
                narrowed = self._event(inner, index, event, layer, hidden, new)
                if narrowed is not None:
                    level, step, states = narrowed
                    hidden = gather_rows(states, step)
                    inner.levels[index] = level
                    self._tables(inner, index, level, layer, hidden, new, kwargs)
            self._read_before(inner, index, hidden, new)
            if inner.cache is not None:
                inner.cache.layers[index].announced = announcement(inner, index)
            if self.bypasser is not None and index in inner.bypass_layers:
                hidden = self.bypasser.before_layer(inner, index, level, layer, hidden, new)
            if args:
                return (hidden, *args[1:]), new
            return args, {**new, "hidden_states": hidden}

        return before_layer

    def _read_before(self, inner: Inner, index: int, hidden: Tensor, new: Mapping[str, Any]) -> None:
        """Serve the events that want something of the input of this layer before it runs."""
        if self.dropper is None or self.reader is None:
            return
        for event in inner.events.values():
            request = self.dropper.request(event)
            if request is not None and request.layer == index:
                self.reader.before_layer(inner, request, event.layer, hidden, new)

    def _tables(
        self,
        inner: Inner,
        index: int,
        level: Level,
        layer: nn.Module,
        hidden: Tensor,
        new: dict[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        """Put masks, positions and rotary tables of the level into the layer's arguments."""
        cached = inner.cache.layers[index] if inner.cache is not None else None
        if answered(inner, index):
            # Whoever attends knows from the books of the cache who sees what.
            new["attention_mask"] = None
        else:
            new["attention_mask"] = self._mask(inner, index, level, hidden, given.get("attention_mask"))
        start = max(begin for begin in inner.levels if begin <= index)
        device = hidden.device
        entry = None if level.entry is None else level.entry.to(device)
        positions = given.get("position_ids")
        relative = None
        if cached is not None and inner.seen and not _counts_alike(cached, reference_layer(inner.cache)):
            relative = cached.shift - (0 if inner.base_shift is None else inner.base_shift.to(cached.shift.device))
        if entry is None and relative is None:
            self._hide_gaps(new, level)
            return
        if positions is not None:
            new["position_ids"] = inner.remembered(
                ("positions", start, id(positions), device, 0 if cached is None else cached.renumbered),
                lambda: _moved(positions, entry, level, relative),
            )
        tables = given["position_embeddings"]
        if entry is None or level.positions is not None or relative is not None:
            new["position_embeddings"] = inner.remembered(
                ("rotary", start, id(tables), device, 0 if cached is None else cached.renumbered),
                lambda: self.adapter.rotary(layer, hidden, new["position_ids"]),
            )
        else:
            new["position_embeddings"] = inner.remembered(
                ("rotary", start, id(tables), device),
                lambda: tuple(gather_table(table, entry) for table in tables),
            )
        self._hide_gaps(new, level)

    def _mask(self, inner: Inner, index: int, level: Level, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """Make the mask of one layer, given that of the decoder."""
        cached = inner.cache.layers[index] if inner.cache is not None else None
        start = max(begin for begin in inner.levels if begin <= index)
        device = hidden.device
        key = (
            "mask",
            start,
            id(mask),
            device,
            None if cached is None else (cached.history, cached.is_sliding),
        )
        window = getattr(cached, "sliding_window", None) if cached is not None and cached.is_sliding else None
        own_mask: Tensor | None = inner.remembered(
            key,
            lambda: layer_mask(
                mask,
                entry=None if level.entry is None else level.entry.to(device),
                real=None if level.real is None else level.real.to(device),
                own=inner.levels[0].length,
                batch=hidden.shape[0],
                query=level.length,
                device=device,
                layer=cached,
                query_slots=level.slots.to(device) + inner.seen,
                window=window,
            ),
        )
        if cached is None or (cached.heads is None and cached.bias is None):
            return own_mask
        return head_mask(own_mask, cached, query=level.length, query_heads=self.adapter.shape.heads, dtype=hidden.dtype)

    def _hide_gaps(self, new: dict[str, Any], level: Level) -> None:
        if "flash" in self.adapter.text_config._attn_implementation and not level.whole:
            new["position_ids"] = None

    # ------------------------------------------------------------------- events

    def _event(
        self,
        inner: Inner,
        index: int,
        event: LayerEvent,
        layer: nn.Module,
        hidden: Tensor,
        new: Mapping[str, Any],
    ) -> tuple[Level, Tensor, Tensor] | None:
        """Let the method choose; return the narrower level, the places to gather and the states, or None."""
        if self.dropper is None or self.reader is None:
            return None
        begin = self.recorder.watch.mark()
        level = inner.level_at(index)
        reading = self.reader.read(inner, index, self.dropper.request(event), layer, hidden, new)
        if inner.gates_learn and isinstance(self.dropper, MaskLearner):
            prompts = self.reader.prompts(inner, level, hidden, reading)
            hide_softly(
                self.adapter, inner, event, level, [(r, self.dropper.training_mask(t, event)) for r, _, t in prompts]
            )
            return None
        keep, states = self._choose(inner, level, event, hidden, reading)
        inner.selection_marks.append((begin, self.recorder.watch.mark()))
        if keep is None:
            return None
        narrower, step = level.narrow(keep.to(hidden.device))
        if states is hidden:
            for projection, output in reading.projected.items():
                replay(inner, projection, gather_rows(output, step))
        if self.dropper.positions == "compact":
            narrower = self._renumber(inner, index, narrower, step, new)
        return narrower, step, states

    def _renumber(self, inner: Inner, index: int, level: Level, step: Tensor, new: Mapping[str, Any]) -> Level:
        before = inner.level_at(index)
        positions: Tensor = new["position_ids"].expand(level.slots.shape[0], -1)
        gathered = positions.gather(1, step)
        first = positions.gather(1, _first_real(before))[:, 0]
        renumbered = compact_positions(gathered, level.real, first)
        self.add_shift(inner, gathered[:, -1] - renumbered[:, -1], index)
        return replace(level, positions=renumbered)

    def _choose(
        self, inner: Inner, level: Level, event: LayerEvent, hidden: Tensor, reading: Reading
    ) -> tuple[Tensor | None, Tensor]:
        """Ask the method row by row; None when no row drops anything. States change where tokens merge."""
        if self.dropper is None or self.reader is None:
            return None, hidden
        batch, length = level.slots.shape
        keep = torch.ones(batch, length, dtype=torch.bool) if level.real is None else level.real.cpu().clone()
        changed, states = False, hidden
        for row, places, tokens in self.reader.prompts(inner, level, hidden, reading):
            with torch.set_grad_enabled(inner.gates_learn and torch.is_grad_enabled()):
                chosen = self.dropper(tokens, event)
            if chosen is None:
                continue
            changed = True
            survivors = places[chosen.indices.cpu()]
            keep[row, places] = False
            keep[row, survivors] = True
            if chosen.features is not None:
                merged = ~chosen.features[:, 0].isnan()
                into = survivors.to(hidden.device)[merged]
                rows = torch.full_like(into, row)
                states = states.index_put((rows, into), chosen.features[merged].to(states.dtype))
        return (keep if changed else None), states

    def _deepstack_hook(self, inner: Inner, index: int) -> Any:
        """Add the features of one deepstack layer to the tokens that are left."""

        def after_layer(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            level = inner.level_at(index)
            visual = inner.deepstack_visual
            if visual is None:
                return output
            device = output.device
            slots = level.slots.to(device)
            number = visual.to(device).flatten().long().cumsum(0).sub(1).view(visual.shape)
            here = visual.to(device).gather(1, slots)
            here = here if level.real is None else here & level.real.to(device)
            features = inner.deepstack[index].to(device, output.dtype)[number.gather(1, slots)[here]]
            return output.index_put(tuple(here.nonzero().T), features, accumulate=True)

        return after_layer


def _first_real(level: Level) -> Tensor:
    """Place of the first real token of each row, ``[B, 1]``."""
    if level.real is None:
        return torch.zeros_like(level.slots[:, :1])
    return level.real.long().argmax(dim=1, keepdim=True)


def _moved(positions: Tensor, entry: Tensor | None, level: Level, relative: Tensor | None) -> Tensor:
    if level.positions is not None:
        return level.positions
    moved = positions if entry is None else gather_positions(positions, entry.to(positions.device))
    return moved if relative is None else moved - relative.to(moved.device)[:, None]


def _counts_alike(layer: Any, reference: Any) -> bool:
    """Layers whose prompts were renumbered equally often count positions alike."""
    return bool(layer.renumbered == reference.renumbered)
