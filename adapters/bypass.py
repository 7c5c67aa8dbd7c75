"""Around a layer: let tokens skip it, freeze in it, or stay out of its attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level, announcement
from mmfast.adapters.kernel_attention import arm_shown
from mmfast.adapters.masks import causal, gather_positions, gather_rows, gather_table, hide
from mmfast.adapters.reading import Reader, peek, switch_on_tap
from mmfast.adapters.recorder import Recorder
from mmfast.token_pruning.layers import LayerBypass, LayerRequest


class Bypasser:
    """Route tokens around layers during a prefill.

    Args:
        adapter: the adapter of the model.
        method: the method that chooses.
        recorder: takes the times of selections.
    """

    def __init__(self, adapter: Adapter, method: LayerBypass, recorder: Recorder) -> None:
        self.adapter = adapter
        self.method = method
        self.reader = Reader(adapter, method)
        self.recorder = recorder
        self.layers = method.layers_of(adapter.shape.layers)

    def arm(self, inner: Inner) -> list[int]:
        """Say which layers to hook in this call."""
        if inner.length == 1 and self.method.routes_decode:
            inner.bypass_layers = frozenset(self.layers)
            return self.layers
        if inner.length == 1 or not any(sum(totals) for totals in inner.media_totals):
            return []
        inner.bypass_layers = frozenset(self.layers)
        requests = {layer: self.method.request(layer) for layer in self.layers}
        if any(requests.values()) or self.method.bypass == "freeze":
            switch_on_tap(self.adapter, inner)
        for layer, request in requests.items():
            self.reader.arm(inner, request, layer)
        return self.layers

    # ------------------------------------------------------------------ before

    def before_layer(
        self, inner: Inner, index: int, level: Level, layer: nn.Module, hidden: Tensor, new: dict[str, Any]
    ) -> Tensor:
        """Choose who takes part, change the arguments ``new`` of the layer, and return its hidden states."""
        if inner.length == 1:
            return self._route_decode(inner, index, level, layer, hidden)
        begin = self.recorder.watch.mark()
        reading = self.reader.read(inner, index, self.method.request(index), layer, hidden, new)
        batch, length = level.slots.shape
        part = torch.ones(batch, length, dtype=torch.bool) if level.real is None else level.real.cpu().clone()
        gate = hidden.new_ones(batch, length, dtype=torch.float32)
        skipped = torch.ones_like(gate)
        shown = hidden
        gated = changed = False
        for row, places, tokens in self.reader.prompts(inner, level, hidden, reading, text_too=self.method.routes_text):
            route = self.method.route(tokens, index, self.adapter.shape.layers)
            part[row, places] = False
            part[row, places[route.selected.cpu()]] = True
            changed = changed or route.selected.numel() < places.numel()
            own = places.to(hidden.device)
            if route.gate is not None:
                gated = True
                gate[row, own] = route.gate.float()
            if route.skipped is not None:
                skipped[row, own] = route.skipped.float()
            if route.states is not None:
                out = torch.ones(own.numel(), dtype=torch.bool, device=own.device)
                out[route.selected] = False
                frozen = own[out]
                shown = shown.index_put((torch.full_like(frozen, row), frozen), route.states[out].to(shown.dtype))
        inner.selection_marks.append((begin, self.recorder.watch.mark()))
        if not changed and not gated and shown is hidden:
            return hidden
        narrower, step = level.narrow(part.to(hidden.device))
        inner.attending[index] = narrower
        if self.method.bypass == "attention":
            inner.fed.add(index)
        inner.tables["bypass", index] = (hidden, step, narrower, skipped)
        if gated:
            taking_part = torch.where(part.to(gate.device), gate, 1.0)
            weights = taking_part if self.method.bypass == "attention" else gather_rows(gate, step)
            self._gate(inner, layer, weights)
        return self._enter(inner, index, level, narrower, step, layer, hidden, shown, new)

    def _route_decode(self, inner: Inner, index: int, level: Level, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Let some rows ignore what the layer makes of their new token, and their cache forget it."""
        with torch.no_grad():
            gate = self.method.decode_route(self.adapter.attention_input(layer, hidden)[:, 0], index)
        visual = None if inner.cache is None else inner.cache.layers[index].visual
        if gate is None or visual is None:
            return hidden
        # Prompts without images run as they would without a plan.
        gate = torch.where(visual.to(gate.device), gate.float(), 1.0)
        part = gate != 0
        self._gate(inner, layer, torch.where(part, gate, 1.0)[:, None])
        if bool(part.all()):
            return hidden
        step = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device)
        real = part.to(hidden.device)[:, None]
        inner.routed[index] = Level(level.slots, real if level.real is None else level.real & real)
        if inner.cache is not None:
            inner.cache.layers[index].announced = announcement(inner, index)
        around = torch.ones(hidden.shape[:2], device=hidden.device)
        inner.tables["bypass", index] = (hidden, step, inner.routed[index], around)
        return hidden

    def _enter(
        self,
        inner: Inner,
        index: int,
        level: Level,
        narrower: Level,
        step: Tensor,
        layer: nn.Module,
        hidden: Tensor,
        shown: Tensor,
        new: dict[str, Any],
    ) -> Tensor:
        if self.method.bypass == "freeze":
            self._show_all(inner, index, layer, shown, new)
            by_kernel = arm_shown(self.adapter, inner, index, level, step, hidden)
            if not by_kernel:
                new["attention_mask"] = _explicit(new.get("attention_mask"), level, shown, inner, index)
            self._narrow(new, step, narrower, level.length, rows_only=True)
            if by_kernel:
                new["attention_mask"] = None
            return gather_rows(hidden, step)
        inner.routed[index] = narrower
        if inner.cache is not None:
            inner.cache.layers[index].announced = announcement(inner, index)
        if self.method.bypass == "skip":
            self._narrow(new, step, narrower, level.length)
            return gather_rows(hidden, step)
        self._narrow_attention(inner, layer, step, narrower, level.length)
        return hidden

    def _narrow(self, new: dict[str, Any], step: Tensor, level: Level, before: int, *, rows_only: bool = False) -> None:
        """Gather masks, positions and rotary tables for the tokens that take part."""
        new["attention_mask"] = _narrow_mask(new.get("attention_mask"), step, level, before, rows_only=rows_only)
        if "flash" in self.adapter.text_config._attn_implementation:
            # Flash attention takes gaps in the positions for the seams of packed sequences.
            new["position_ids"] = None
        elif new.get("position_ids") is not None:
            new["position_ids"] = gather_positions(new["position_ids"], step)
        new["position_embeddings"] = tuple(gather_table(table, step) for table in new["position_embeddings"])

    def _narrow_attention(self, inner: Inner, layer: nn.Module, step: Tensor, level: Level, length: int) -> None:
        """Let the attention module work on the tokens that take part and return zeros for the others."""
        module = self.adapter.attention(layer)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = dict(kwargs)
            self._narrow(new, step, level, length)
            new["hidden_states"] = gather_rows(kwargs["hidden_states"], step)
            inner.tables["attention", module] = kwargs["hidden_states"]
            return args, new

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            whole = torch.zeros_like(inner.tables.pop(("attention", module)))
            return (_scatter(whole, step, output[0], level.real), *output[1:])

        inner.undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        inner.undo.append(module.register_forward_hook(after).remove)

    def _gate(self, inner: Inner, layer: nn.Module, weights: Tensor) -> None:
        """Multiply what the feed-forward part adds to each token."""
        part = self.adapter.feed_forward_end(layer)

        def weigh(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * weights[..., None].to(output.dtype)

        inner.undo.append(part.register_forward_hook(weigh).remove)

    def _show_all(
        self,
        inner: Inner,
        index: int,
        layer: nn.Module,
        shown: Tensor,
        new: dict[str, Any],
    ) -> None:
        """Compute keys and values of all tokens, and let the layer attend to them with the queries of some."""
        request = LayerRequest(index, ahead=True, values=True)
        last = torch.zeros(shown.shape[0], dtype=torch.int64, device=shown.device)
        capture, _ = peek(self.adapter, inner, index, layer, shown, new, request, last, with_past=False)
        if capture.key is None or capture.value is None:
            raise RuntimeError("the attention module ended without attending")
        new["past_key_values"] = _AllShown(inner.cache, capture.key, capture.value)

    # ------------------------------------------------------------------- after

    def after_layer(self, inner: Inner, index: int) -> Any:
        """Put the tokens that took part back among the others."""

        def after(layer: nn.Module, args: Any, output: Any) -> Any:
            kept = inner.tables.pop(("bypass", index), None)
            if kept is None:
                return None
            hidden, step, level, skipped = kept
            if self.method.bypass == "attention":
                return None
            states = output[0] if isinstance(output, tuple) else output
            around = hidden * skipped[..., None].to(hidden.dtype)
            whole = _scatter(around, step, states, level.real)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return after


class _AllShown:
    """A cache that stores and returns the keys and values of all tokens, whoever asks."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self._cache, self._keys, self._values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            return self._keys, self._values
        stored: tuple[Tensor, Tensor] = self._cache.update(self._keys, self._values, layer_idx, *args, **kwargs)
        return stored


def _explicit(mask: Tensor | None, level: Level, hidden: Tensor, inner: Inner, index: int) -> Tensor:
    """Write the mask out where causality said it all: some rows go missing, so it no longer does."""
    if mask is not None:
        return mask
    past = inner.cache.layers[index].stored if inner.cache is not None else 0
    own = causal(level.length, hidden.device)
    before = torch.ones(1, 1, level.length, past, dtype=torch.bool, device=hidden.device)
    return torch.cat([before, own], dim=-1)


def _narrow_mask(mask: Tensor | None, step: Tensor, level: Level, before: int, *, rows_only: bool) -> Tensor | None:
    """Gather rows, and unless ``rows_only`` also the columns of this call, of a 2-D or 4-D mask.

    Args:
        mask: as the layer got it.
        step: ``[B, K]`` places of the tokens that take part.
        level: these tokens.
        before: number of tokens from which they were chosen.
        rows_only: keep all columns.
    """
    if mask is None:
        if level.real is None:
            return None
        return causal(level.length, step.device) & level.real[:, None, None, :]
    batch, length = step.shape
    past = mask.shape[-1] - before
    if mask.ndim == 2:
        own = mask[:, past:].gather(1, step)
        own = own if level.real is None else own * level.real.to(own.dtype)
        return torch.cat([mask[:, :past], own], dim=1)
    mask = mask.expand(batch, -1, -1, -1)
    rows = mask.gather(2, step[:, None, :, None].expand(batch, mask.shape[1], length, mask.shape[3]))
    if rows_only:
        return rows
    new = rows[..., past:].gather(3, step[:, None, None, :].expand(batch, mask.shape[1], length, length))
    if level.real is not None:
        new = hide(new, ~level.real[:, None, None, :])
    return torch.cat([rows[..., :past], new], dim=-1)


def _scatter(whole: Tensor, step: Tensor, states: Tensor, real: Tensor | None) -> Tensor:
    """Write ``states`` ``[B, K, D]`` over the places ``step`` of ``whole`` ``[B, S, D]``; padding is left out."""
    rows = torch.arange(step.shape[0], device=step.device)[:, None].expand_as(step)
    if real is None:
        return whole.index_put((rows, step), states)
    return whole.index_put((rows[real], step[real]), states[real])
