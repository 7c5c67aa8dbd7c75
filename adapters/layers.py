"""Inside the decoder: drop tokens between layers and keep every table in step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.attention import Capture, CaptureDone, tap_name, unwatch, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import reference_layer
from mmfast.adapters.call import Inner, Level, compact_positions
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.masks import gather_positions, gather_rows, layer_mask
from mmfast.adapters.recorder import Recorder
from mmfast.kv.cache import Announcement
from mmfast.token_pruning.base import LayerDropper, LayerEvent, LayerTokens


class LayerRunner:
    """Arm layer hooks for the calls that need them, and only for those.

    Args:
        adapter: the adapter of the model.
        dropper: the method that drops inside the language model, if any.
        recorder: takes the times of selections.
    """

    def __init__(self, adapter: Adapter, dropper: LayerDropper | None, recorder: Recorder) -> None:
        self.adapter = adapter
        self.dropper = dropper
        self.recorder = recorder

    # ------------------------------------------------------------------- cache

    def announce(self, inner: Inner) -> None:
        """Tell every cache layer how many logical tokens this call brings."""
        if inner.cache is None:
            return
        for layer in inner.cache.layers:
            layer.announced = _note(inner, 0)

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
        affected = self._affected(inner)
        for index, layer in enumerate(self.adapter.layers):
            if index in affected:
                handle = layer.register_forward_pre_hook(self._pre_hook(inner, index), with_kwargs=True)
                inner.undo.append(handle.remove)
            if index < len(inner.deepstack):
                handle = layer.register_forward_hook(self._deepstack_hook(inner, index))
                inner.undo.append(handle.remove)
        requests = {} if self.dropper is None else {e.layer: self.dropper.rows(e) for e in inner.events.values()}
        if any(requests.values()):
            self._switch_on_tap(inner)
        for event_layer, request in requests.items():
            if request is not None and not request.ahead:
                self._read_rows(inner, request.layer, event_layer)

    def disarm(self, inner: Inner) -> None:
        """End the call: take off hooks, stop reading, drop announcements a failure left behind."""
        for undo in reversed(inner.undo):
            undo()
        inner.undo.clear()
        if inner.cache is not None:
            for layer in inner.cache.layers:
                layer.announced = None

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
        unmasked = inner.length == 1 and implementation == "sdpa" and inner.levels[0].real is None
        for index, layer in enumerate(layers):
            if layer.is_sliding or (
                layer.history != reference.history
                and not (
                    # One token that sees everything stored needs no mask, however much that is.
                    unmasked and layer.valid is None and reference.valid is None and _counts_alike(layer, reference)
                )
            ):
                affected.add(index)
        return affected

    def _switch_on_tap(self, inner: Inner) -> None:
        config = self.adapter.text_config
        before = config._attn_implementation_internal

        def switch_off() -> None:
            config._attn_implementation_internal = before

        inner.undo.append(switch_off)
        config._attn_implementation_internal = tap_name(config._attn_implementation)

    def _read_rows(self, inner: Inner, layer: int, event_layer: int) -> None:
        """Watch a layer's attention while it runs, for the event that follows."""
        module = self.adapter.attention(self.adapter.layers[layer])

        def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            capture = Capture(_last_rows(inner.level_at(layer), inner.prompt_end))
            inner.tables["capture", event_layer] = capture
            watch(module, capture)

        handle = module.register_forward_pre_hook(begin, with_kwargs=True)
        inner.undo.extend([handle.remove, lambda: unwatch(module)])

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
                    level, step = narrowed
                    hidden = gather_rows(hidden, step)
                    inner.levels[index] = level
                    self._tables(inner, index, level, layer, hidden, new, kwargs)
            if inner.cache is not None:
                inner.cache.layers[index].announced = _note(inner, index)
            if args:
                return (hidden, *args[1:]), new
            return args, {**new, "hidden_states": hidden}

        return before_layer

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
        start = max(begin for begin in inner.levels if begin <= index)
        device = hidden.device
        entry = None if level.entry is None else level.entry.to(device)
        mask = given.get("attention_mask")
        key = (
            "mask",
            start,
            id(mask),
            device,
            None if cached is None else (cached.history, cached.is_sliding),
        )
        window = getattr(cached, "sliding_window", None) if cached is not None and cached.is_sliding else None
        new["attention_mask"] = inner.remembered(
            key,
            lambda: layer_mask(
                mask,
                entry=entry,
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
        if level.positions is not None or relative is not None:
            new["position_embeddings"] = inner.remembered(
                ("rotary", start, id(tables), device, 0 if cached is None else cached.renumbered),
                lambda: self.adapter.rotary(layer, hidden, new["position_ids"]),
            )
        else:
            new["position_embeddings"] = inner.remembered(
                ("rotary", start, id(tables), device),
                lambda: tuple(_gather_table(table, entry) for table in tables),
            )
        self._hide_gaps(new, level)

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
    ) -> tuple[Level, Tensor] | None:
        """Let the method choose; return the narrower level and the places to gather, or None."""
        begin = self.recorder.watch.mark()
        rows = self._rows(inner, index, event, layer, hidden, new)
        level = inner.level_at(index)
        keep = self._choose(inner, level, event, hidden.detach(), rows)
        inner.selection_marks.append((begin, self.recorder.watch.mark()))
        projected = inner.tables.pop("projected", {})
        if keep is None:
            return None
        narrower, step = level.narrow(keep.to(hidden.device))
        for projection, output in projected.items():
            _replay(inner, projection, gather_rows(output, step))
        if self.dropper is not None and self.dropper.positions == "compact":
            narrower = self._renumber(inner, index, narrower, step, new)
        return narrower, step

    def _renumber(self, inner: Inner, index: int, level: Level, step: Tensor, new: Mapping[str, Any]) -> Level:
        before = inner.level_at(index)
        positions: Tensor = new["position_ids"].expand(level.slots.shape[0], -1)
        gathered = positions.gather(1, step)
        first = positions.gather(1, _first_real(before))[:, 0]
        renumbered = compact_positions(gathered, level.real, first)
        self.add_shift(inner, gathered[:, -1] - renumbered[:, -1], index)
        return replace(level, positions=renumbered)

    def _rows(
        self,
        inner: Inner,
        index: int,
        event: LayerEvent,
        layer: nn.Module,
        hidden: Tensor,
        new: Mapping[str, Any],
    ) -> Tensor | None:
        """Return attention rows ``[B, H, past + K]``, if the method asked for them."""
        request = None if self.dropper is None else self.dropper.rows(event)
        if request is None:
            return None
        if not request.ahead:
            found: Capture = inner.tables.pop(("capture", index))
            return found.result
        capture = Capture(_last_rows(inner.level_at(index), inner.prompt_end), stop=True)
        module = self.adapter.attention(layer)
        watch(module, capture)
        arguments = {name: value for name, value in new.items() if name != "hidden_states"}
        arguments["past_key_values"] = None if inner.cache is None else _Peek(inner.cache)
        projected: dict[nn.Module, Tensor] = {}
        with torch.no_grad():
            normed = self.adapter.attention_input(layer, hidden)
        handles = [child.register_forward_hook(_recorder(normed, projected)) for child in module.children()]
        spared = Ledger()
        for name, rows in (("q_proj", capture.rows), ("v_proj", None)):
            if isinstance(getattr(module, name, None), nn.Linear):
                _spare(module.get_submodule(name), rows, spared)
        try:
            with torch.no_grad():
                module(hidden_states=normed, **arguments)
        except CaptureDone:
            pass
        finally:
            unwatch(module)
            spared.undo()
            for handle in handles:
                handle.remove()
        if not torch.is_grad_enabled():
            inner.tables["projected"] = projected
        return capture.result

    def _choose(
        self, inner: Inner, level: Level, event: LayerEvent, hidden: Tensor, rows: Tensor | None
    ) -> Tensor | None:
        """Ask the method row by row; None when no row drops anything."""
        batch, length = level.slots.shape
        keep = torch.ones(batch, length, dtype=torch.bool) if level.real is None else level.real.cpu().clone()
        slots, changed = level.slots.cpu(), False
        for row in range(batch):
            totals = inner.media_totals[row]
            if not sum(totals):
                continue
            alive = keep[row].nonzero().squeeze(-1)
            candidate = _book(inner.candidate)[row, slots[row, alive]]
            candidates = candidate.nonzero().squeeze(-1)
            places = slots[row, alive[candidates]]
            whole = alive.numel() == length
            device = hidden.device
            own = None
            if rows is not None:
                own = rows[row][:, rows.shape[2] - length :]
                own = own if whole else own[:, alive.to(device)]
            with torch.no_grad():
                chosen = self.dropper(  # type: ignore[misc]
                    LayerTokens(
                        hidden=hidden[row] if whole else hidden[row, alive.to(device)],
                        candidates=candidates.to(device),
                        origin=_book(inner.number)[row, places].to(device),
                        media=_book(inner.media)[row, places].to(device),
                        total=sum(totals),
                        media_totals=totals,
                        attention_rows=own,
                    ),
                    event,
                )
            if chosen is None:
                continue
            changed = True
            keep[row, alive[candidates]] = False
            keep[row, alive[chosen.cpu()]] = True
        return keep if changed else None

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


def _note(inner: Inner, index: int) -> Announcement:
    """Announce to one cache layer the tokens that enter its decoder layer."""
    start = max(begin for begin in inner.levels if begin <= index)
    level = inner.levels[start]
    return Announcement(inner.length, level.real, level.slots, start)


def _recorder(normed: Tensor, into: dict[nn.Module, Tensor]) -> Any:
    """Note what the projections of an attention module make of its whole input, if they see it whole."""

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        spared = "forward" in vars(module)
        if not spared and args and args[0] is normed and isinstance(output, Tensor):
            into[module] = output

    return record


def _spare(projection: nn.Module, rows: Tensor | None, ledger: Ledger) -> None:
    """Let a projection work on one row per prompt only, or on none: nothing else of it will be looked at.

    Reading one row of attention needs the keys of all tokens, the query of one and no values.
    """
    whole = projection.forward

    def on_rows(hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        output = hidden.new_zeros(1).expand(batch, length, int(projection.out_features))  # type: ignore[arg-type]
        if rows is None:
            return output
        every = torch.arange(batch, device=hidden.device)
        return output.index_put((every, rows), whole(hidden[every, rows]))

    ledger.set_attribute(projection, "forward", on_rows)


def _replay(inner: Inner, projection: nn.Module, value: Tensor) -> None:
    """Let a projection return, once, what it has computed already.

    A projection works token by token: what it made of all tokens, gathered, is what it would make of
    those that are left, so reading a layer's attention ahead costs no second projection.
    """
    ledger = Ledger()

    def once(*args: Any, **kwargs: Any) -> Tensor:
        ledger.undo()
        return value

    ledger.set_attribute(projection, "forward", once)
    inner.undo.append(ledger.undo)


class _Peek:
    """Show a cache to an attention module without letting it store anything."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer = self._cache.layers[layer_idx]
        if not layer.stored:
            return keys, values
        return torch.cat([layer.keys, keys], dim=-2), torch.cat([layer.values, values], dim=-2)


def _book(book: Tensor | None) -> Tensor:
    if book is None:
        raise RuntimeError("visual tokens were not numbered before an event")
    return book


def _last_rows(level: Level, prompt_end: int | None) -> Tensor:
    """Place of the last real token of each row, or of the last one at or before ``prompt_end``."""
    real = torch.ones_like(level.slots, dtype=torch.bool) if level.real is None else level.real
    if prompt_end is not None:
        real = real & (level.slots <= prompt_end)
    places = torch.arange(level.length, device=level.slots.device)
    return (places * real).argmax(dim=1)


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


def _gather_table(table: Tensor, entry: Tensor | None) -> Tensor:
    """Gather cosines or sines ``[B or 1, K, d]`` (``[3, B, K, d]`` for M-RoPE)."""
    if entry is None:
        return table
    entry = entry.to(table.device)
    if table.ndim == 4:
        wanted = entry[None, :, :, None].expand(table.shape[0], -1, -1, table.shape[-1])
        return table.expand(-1, entry.shape[0], -1, -1).gather(2, wanted)
    return gather_rows(table, entry)
