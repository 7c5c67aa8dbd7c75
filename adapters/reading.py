"""Read inside the decoder what a method asked for, and hand it over prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.attention import Capture, CaptureDone, register_tap, tap_name, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner, Level
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.reduction import slot_signals
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.layers import LayerRequest, LayerTokens


@dataclass
class Reading:
    """What has been read for one event or layer.

    Attributes:
        capture: the attention asked for.
        activations: ``[B, K, M]`` input of the down projection of the layer before.
        normed: ``[B, K, D]`` hidden states through the norm asked for.
        projected: projection -> its output for all tokens, to be used again by the layer.
    """

    capture: Capture | None = None
    activations: Tensor | None = None
    normed: Tensor | None = None
    projected: dict[nn.Module, Tensor] = field(default_factory=dict)


def switch_on_tap(adapter: Adapter, inner: Inner) -> None:
    """Let the decoder attend through the tap for the length of a call, however many ask for it."""
    config = adapter.text_config
    before = config._attn_implementation_internal
    if before.startswith(tap_name("")):
        return
    ledger = Ledger()
    # Who may do without the tap does not ask for it before the first call that has a use for it.
    register_tap(config._attn_implementation, ledger)
    ledger.enter(lambda: setattr(config, "_attn_implementation_internal", before))
    inner.undo.append(ledger.undo)
    config._attn_implementation_internal = tap_name(config._attn_implementation)


def capture_attention(adapter: Adapter, inner: Inner, layer: int, note: Callable[[Capture], None]) -> None:
    """Capture what a layer attends with when it runs.

    Args:
        adapter: the adapter of the model.
        inner: the call.
        layer: index of the layer.
        note: gets the capture, still empty, when the attention module is entered.
    """
    module = adapter.attention(adapter.layers[layer])
    ends: list[Callable[[], None]] = []

    def end() -> None:
        while ends:
            ends.pop()()

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Entered a second time, what counts is the last.
        end()
        level = inner.reads_at(layer)
        capture = Capture(level.slots, real=level.real)
        note(capture)
        ends.append(watch(module, capture))

    handle = module.register_forward_pre_hook(begin, with_kwargs=True)
    inner.undo.extend([handle.remove, end])


class Reader:
    """Arm and collect the readings of one method.

    Args:
        adapter: the adapter of the model.
        method: the method that acts inside the language model.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter = adapter
        self.method = method

    # ------------------------------------------------------------------ arming

    def arm(self, inner: Inner, request: LayerRequest | None, layer: int) -> None:
        """Prepare the readings for an event at ``layer`` that must be made while earlier layers run."""
        if request is not None and not request.ahead and request.rotary:
            self._watch_attention(inner, request.layer, layer)
        if "activations" in self.method.needs:
            down = self.adapter.down_projection(self.adapter.layers[layer - 1])

            def note(_: nn.Module, args: tuple[Any, ...]) -> None:
                inner.tables["activations", layer] = args[0].detach()

            inner.undo.append(down.register_forward_pre_hook(note).remove)

    def _watch_attention(self, inner: Inner, layer: int, event_layer: int) -> None:
        users: list[int] = inner.tables.setdefault(("captured for", layer), [])
        users.append(event_layer)
        if len(users) > 1:
            return

        def note(capture: Capture) -> None:
            for user in users:
                inner.tables["capture", user] = capture

        capture_attention(self.adapter, inner, layer, note)

    def before_layer(
        self, inner: Inner, request: LayerRequest | None, event_layer: int, hidden: Tensor, new: Mapping[str, Any]
    ) -> None:
        """Read, before layer ``request.layer`` runs, what only its input can give."""
        if request is not None and not request.ahead and not request.rotary:
            layer = self.adapter.layers[request.layer]
            capture, _ = peek(
                self.adapter, inner, request.layer, layer, hidden, new, request, self._last(inner, request)
            )
            inner.tables["capture", event_layer] = capture

    def _last(self, inner: Inner, request: LayerRequest) -> Tensor | None:
        if request.queries != "last":
            return None
        return last_rows(inner.level_at(request.layer), inner.ends)

    # -------------------------------------------------------------- collecting

    def read(
        self,
        inner: Inner,
        index: int,
        request: LayerRequest | None,
        layer: nn.Module,
        hidden: Tensor,
        new: Mapping[str, Any],
    ) -> Reading:
        """Collect everything the method asked for at the input of layer ``index``."""
        found = Reading(activations=inner.tables.pop(("activations", index), None))
        if request is not None and not request.ahead:
            found.capture = inner.tables.pop(("capture", index))
        elif request is not None:
            last = self._last(inner, request)
            found.capture, found.projected = peek(self.adapter, inner, index, layer, hidden, new, request, last)
        with torch.set_grad_enabled(inner.gates_learn and torch.is_grad_enabled()):
            if "final_norm" in self.method.needs:
                found.normed = self.adapter.final_norm(hidden)
            elif "layer_norm" in self.method.needs:
                found.normed = self.adapter.attention_input(layer, hidden)
        return found

    def prompts(
        self, inner: Inner, level: Level, hidden: Tensor, reading: Reading, *, text_too: bool = False
    ) -> Iterator[tuple[int, Tensor, LayerTokens]]:
        """Go through the prompts that have candidates.

        Args:
            inner: the call.
            level: the tokens in ``hidden``.
            hidden: ``[B, K, D]``.
            reading: what was read.
            text_too: text tokens are candidates as well.

        Yields:
            The row, ``[V]`` int64 places of the candidates in the level (on the CPU), and the tokens.
        """
        batch, length = level.slots.shape
        slots = level.slots.cpu()
        real = torch.ones(batch, length, dtype=torch.bool) if level.real is None else level.real.cpu()
        device = hidden.device
        ends = last_rows(level, inner.ends).tolist()
        lesson = inner.lesson if inner.gates_learn else None
        answers = None if lesson is None else lesson.answers
        for row in range(batch):
            totals = inner.media_totals[row] if inner.media_totals else ()
            if not sum(totals):
                continue
            alive = real[row].nonzero().squeeze(-1)
            whole = alive.numel() == length
            own_slots = slots[row, alive]
            candidate = book(inner.candidate)[row, own_slots]
            if text_too:
                candidate = torch.ones_like(candidate)
            candidates = candidate.nonzero().squeeze(-1)
            places = own_slots[candidates]
            pick = _picker(row, None if whole else alive.to(device), attached=lesson is not None)
            yield (
                row,
                alive[candidates],
                LayerTokens(
                    hidden=pick(hidden),
                    candidates=candidates.to(device),
                    origin=book(inner.number)[row, places].to(device),
                    media=book(inner.media)[row, places].to(device),
                    total=sum(totals),
                    media_totals=totals,
                    last=int((alive <= ends[row]).sum()) - 1,
                    places=(own_slots - inner.first_slot(row)).to(device),
                    layouts=inner.layouts[row],
                    attention=_view(reading.capture, row, own_slots, whole),
                    embeds=None if inner.embeds is None else inner.embeds[row, own_slots.to(inner.embeds.device)],
                    normed=None if reading.normed is None else pick(reading.normed),
                    activations=None if reading.activations is None else pick(reading.activations),
                    signals={
                        name: value.to(device)
                        for name, value in slot_signals(inner.segments[row], places, self.method).items()
                    },
                    memory=inner.memory[row],
                    lesson=lesson,
                    answers=None if answers is None else answers[row, own_slots.to(answers.device)].to(device),
                ),
            )


def _picker(row: int, alive: Tensor | None, *, attached: bool = False) -> Callable[[Tensor], Tensor]:
    def pick(states: Tensor) -> Tensor:
        own = states[row] if alive is None else states[row, alive]
        return own if attached else own.detach()

    return pick


def _view(capture: Capture | None, row: int, own_slots: Tensor, whole: bool) -> Any:
    """Cut the attention of one prompt out, also where tokens went since it was read."""
    if capture is None:
        return None
    if whole and capture.slots.shape[1] == own_slots.numel():
        return capture.view(row, None)
    read = capture.slots[row].cpu()
    # Padding points at dropped tokens, so a slot may occur twice; the real one is the later.
    order = {int(slot): place for place, slot in enumerate(read.tolist())}
    return capture.view(row, torch.tensor([order[int(slot)] for slot in own_slots.tolist()]))


def peek(
    adapter: Adapter,
    inner: Inner,
    index: int,
    layer: nn.Module,
    hidden: Tensor,
    new: Mapping[str, Any],
    request: LayerRequest,
    last: Tensor | None,
    *,
    with_past: bool = True,
) -> tuple[Capture, dict[nn.Module, Tensor]]:
    """Run the first part of a layer's attention ahead of the layer: projections, norms and rotation.

    Args:
        adapter: the adapter of the model.
        inner: the call.
        index: the layer's index.
        layer: the layer.
        hidden: ``[B, K, D]`` input of the layer.
        new: arguments of the layer.
        request: what is wanted of it.
        last: ``[B]`` the only rows whose queries will be looked at; None = all.
        with_past: join the cached keys and values.

    Returns:
        What it attends with, and what its projections made of all tokens (empty under autograd).
    """
    capture = Capture(inner.level_at(index).slots, stop=True)
    module = adapter.attention(layer)
    arguments = {name: value for name, value in new.items() if name != "hidden_states"}
    if not request.rotary:
        cos, sin = arguments["position_embeddings"]
        arguments["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
    # What is cached has been rotated, so it cannot stand beside what has not.
    with_past = with_past and request.rotary and inner.cache is not None
    arguments["past_key_values"] = Peek(inner.cache) if with_past else None
    projected: dict[nn.Module, Tensor] = {}
    with torch.no_grad():
        normed = adapter.attention_input(layer, hidden)
    handles = [child.register_forward_hook(_recorder(normed, projected)) for child in module.children()]
    spared = Ledger()
    if last is not None and isinstance(getattr(module, "q_proj", None), nn.Linear):
        _spare(module.get_submodule("q_proj"), last, spared)
    if not request.values and isinstance(getattr(module, "v_proj", None), nn.Linear):
        _spare(module.get_submodule("v_proj"), None, spared)
    end = watch(module, capture)
    try:
        with torch.no_grad():
            module(hidden_states=normed, **arguments)
    except CaptureDone:
        pass
    finally:
        end()
        spared.undo()
        for handle in handles:
            handle.remove()
    return capture, {} if torch.is_grad_enabled() else projected


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
        # Under autocast a projection gives another type than it reads.
        return output.index_put((every, rows), whole(hidden[every, rows]).to(output.dtype))

    ledger.set_attribute(projection, "forward", on_rows)


def replay(inner: Inner, projection: nn.Module, value: Tensor) -> None:
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


class Peek:
    """Show a cache to an attention module without letting it store anything."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what is stored and what is new, joined."""
        layer = self._cache.layers[layer_idx]
        if not layer.stored:
            return keys, values
        return torch.cat([layer.keys, keys], dim=-2), torch.cat([layer.values, values], dim=-2)


def book(book: Tensor | None) -> Tensor:
    """Return a book of the visual tokens, which must have been made by now."""
    if book is None:
        raise RuntimeError("visual tokens were not numbered before an event")
    return book


def last_rows(level: Level, prompt_end: int | Tensor | None) -> Tensor:
    """Place of the last real token of each row, or of the last one at or before ``prompt_end`` (``[B, 1]`` or one)."""
    real = torch.ones_like(level.slots, dtype=torch.bool) if level.real is None else level.real
    if prompt_end is not None:
        end = prompt_end.to(level.slots.device) if isinstance(prompt_end, Tensor) else prompt_end
        real = real & (level.slots <= end)
    places = torch.arange(level.length, device=level.slots.device)
    return (places * real).argmax(dim=1)
