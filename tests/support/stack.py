"""The layers of the reference: nothing ever leaves the sequence, masks hide what a plan took out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerRequest, LayerTokens
from mmfast.tokens import Keep, Layout
from support.attended import Attended, Recording, unrotated


@dataclass(frozen=True)
class Work:
    """Places in the unpadded prompt that one layer works on.

    Attributes:
        alive: tokens that no layer has dropped so far.
        attending: those that attend.
        shown: those whose keys and values the layer makes.
        fed: those that pass the feed-forward part.
    """

    alive: Tensor
    attending: Tensor
    shown: Tensor
    fed: Tensor


@dataclass
class Turn:
    """One call that brought a prompt.

    Attributes:
        begin: the place in the unpadded sequence at which it began.
        places: its tokens in the sequence that entered the decoder.
        layouts: where the tokens of its images and videos lie, newline tokens left out.
        totals: their number, per image or video.
        memory: what a method remembers.
        survivors: layer of an event -> places alive after it.
    """

    begin: int
    places: Tensor
    layouts: tuple[Layout, ...]
    totals: tuple[int, ...]
    memory: dict[str, Any] = field(default_factory=dict)
    survivors: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """What runs through the decoder of the reference.

    Attributes:
        decoder: the eager decoder.
        kinds: per layer, the kind of its mask.
        visible: kind -> bool ``[n, n]``, who may look at whom while nothing is dropped.
        positions: position ids of all n tokens.
        embeds: ``[n, D]``.
        prompt: number of tokens that are no given ones.
        slots: ``[prompt]`` their places in the unpadded prompt.
        media: ``[n]`` number of the image or video of each token that may be dropped; -1 for others.
        signals: name -> ``[n, ...]`` signals of the vision tower, at the places of visual tokens.
        bias: ``[n, n]`` what is added to the logits of attention.
    """

    decoder: Any
    kinds: Sequence[str]
    visible: dict[str, Tensor]
    positions: Tensor
    embeds: Tensor
    prompt: int
    slots: Tensor
    media: Tensor
    signals: dict[str, Tensor]
    bias: Tensor


class Stack:
    """Hooks on the layers of the reference.

    Args:
        sequence: what runs through.
        dropper: the method that drops, if any.
        bypass: the method that lets tokens go around layers, if any.
        turns: the calls that brought prompts.
        cut: turns of an earlier run with the same decisions, whose truncated caches the tokens after them read.
    """

    def __init__(
        self,
        sequence: Passage,
        dropper: LayerDropper | None,
        bypass: LayerBypass | None,
        turns: list[Turn],
        cut: list[Turn] | None = None,
    ) -> None:
        self.sequence, self.dropper, self.bypass, self.turns, self.cut = sequence, dropper, bypass, turns, cut
        self.layers = sequence.decoder.layers
        self.depth = len(self.layers)
        self.positions = sequence.positions
        self.renumbered = False
        self.alive = torch.ones(len(sequence.media), dtype=torch.bool)
        self.events = {event.layer: event for event in dropper.events(self.depth)} if dropper else {}
        self.routed = set(bypass.layers_of(self.depth)) if bypass else set()
        self.requests = {layer: dropper.request(event) for layer, event in self.events.items()}
        self.ways = {layer: bypass.request(layer) for layer in self.routed}
        self.history: list[Work] = []
        self.seen: list[Tensor] = []
        self.unrotated: dict[int, Attended] = {}
        self.activations: dict[int, Tensor] = {}
        self.pending: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> None:
        attention = [layer.self_attn for layer in self.layers]
        self.recording = Recording(*attention)
        self.recording.__enter__()
        self.handles = []
        for index, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._after))
            down = layer.mlp.down_proj
            self.handles.append(down.register_forward_pre_hook(self._note_activations(index)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.recording.__exit__()

    # ------------------------------------------------------------------------ hooks

    def _note_activations(self, index: int) -> Any:
        def note(module: nn.Module, args: tuple[Tensor]) -> None:
            self.activations[index] = args[0][0]

        return note

    def _before(self, index: int) -> Any:
        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            if index in self.events:
                self._drop(index, hidden, kwargs)
            self.seen.append(self.alive.clone())
            if any(_reads(request, index) for request in self.requests.values()):
                self.unrotated[index] = self._attend(index, hidden, kwargs, rotary=False)
            part = self.alive.clone()
            entering = hidden
            if index in self.routed:
                part, entering = self._route(index, hidden, kwargs)
            self._book(part)
            return (entering, *args[1:]) if args else args, self._arguments(index, entering, kwargs, part, bool(args))

        return before

    def _arguments(
        self, index: int, hidden: Tensor, kwargs: dict[str, Any], part: Tensor, positional: bool = True
    ) -> dict[str, Any]:
        """Arguments of a layer in which only some tokens take part."""
        shown = part if self.bypass is None or self.bypass.bypass != "freeze" else self.alive
        new = {**kwargs, "attention_mask": additive(self._visible(index) & shown, self.sequence.bias)}
        if self.renumbered:
            new["position_embeddings"] = self.sequence.decoder.rotary_emb(hidden, self.positions)
        return new if positional else {**new, "hidden_states": hidden}

    def _visible(self, index: int) -> Tensor:
        """Who may look at whom in a layer, as far as its cache still holds them."""
        visible = self.sequence.visible[self.sequence.kinds[index]]
        if self.cut is None or self.dropper is None:
            return visible
        visible = visible.clone()
        for event_layer, first, last in self.dropper.truncations(self.depth):
            for turn in self.cut:
                if first <= index < last and event_layer in turn.survivors:
                    gone = turn.places[~torch.isin(turn.places, turn.survivors[event_layer])]
                    visible[int(turn.places[-1]) + 1 :, gone] = False
        return visible

    def _book(self, part: Tensor) -> None:
        prompt, slots = self.sequence.prompt, self.sequence.slots
        alive, some = slots[self.alive[:prompt]], slots[part[:prompt]]
        kind = "skip" if self.bypass is None else self.bypass.bypass
        self.history.append(
            Work(alive, some, alive if kind == "freeze" else some, alive if kind == "attention" else some)
        )

    # ------------------------------------------------------------------------ reading

    def _attend(self, index: int, hidden: Tensor, kwargs: dict[str, Any], *, rotary: bool) -> Attended:
        """Run the attention of a layer on its input, for what it attends with."""
        layer = self.layers[index]
        arguments = self._arguments(index, hidden, kwargs, self.alive)
        if not rotary:
            arguments["position_embeddings"] = unrotated(arguments["position_embeddings"])
        arguments["hidden_states"] = layer.input_layernorm(hidden)
        layer.self_attn(**arguments)
        return self.recording.runs[layer.self_attn].pop()

    def _view(
        self, request: LayerRequest | None, index: int, own: Tensor, start: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> AttentionView | None:
        """Attention of a turn, whose tokens ``own`` are alive, as asked for at the input of layer ``index``."""
        if request is None:
            return None
        if request.ahead:
            attended = self._attend(request.layer, hidden, kwargs, rotary=request.rotary)
        elif request.rotary:
            attended = self.recording.last(self.layers[request.layer].self_attn)
        else:
            attended = self.unrotated[request.layer]
        # An earlier turn is in a layer's cache as far as it was alive there; that it dropped something just
        # now counts only where that layer is still to come.
        stored = (self.alive if request.ahead else self.seen[request.layer]).clone()
        stored[start:] = False
        visible = self._visible(request.layer)
        if request.layer < index and self.cut is not None:
            stored &= visible[start]
        past = stored.nonzero().squeeze(-1) if request.rotary else own[:0]
        return attended.view(own, torch.cat([past, own]), visible)

    def _tokens(
        self,
        turn: Turn,
        request: LayerRequest | None,
        index: int,
        hidden: Tensor,
        kwargs: dict[str, Any],
        needs: frozenset[str],
        *,
        text_too: bool = False,
    ) -> tuple[Tensor, LayerTokens]:
        """The tokens of a turn; also the places of those that are alive."""
        own = turn.places[self.alive[turn.places]]
        media = self.sequence.media
        visual = turn.places[media[turn.places] >= 0]
        number = torch.full_like(media, -1)
        number[visual] = torch.arange(len(visual))
        candidates = torch.arange(len(own)) if text_too else (media[own] >= 0).nonzero().squeeze(-1)
        places = own[candidates]
        first = int(media[visual].min())
        normed = None
        if "final_norm" in needs:
            normed = self.sequence.decoder.norm(hidden)[0, own]
        elif "layer_norm" in needs:
            normed = self.layers[index].input_layernorm(hidden)[0, own]
        return own, LayerTokens(
            hidden=hidden[0, own],
            candidates=candidates,
            origin=number[places],
            media=torch.where(media[places] >= 0, media[places] - first, -1),
            total=len(visual),
            media_totals=turn.totals,
            last=len(own) - 1,
            places=self.sequence.slots[own] - turn.begin,
            layouts=turn.layouts,
            attention=self._view(request, index, own, int(turn.places[0]), hidden, kwargs),
            embeds=self.sequence.embeds[own] if "embeds" in needs else None,
            normed=normed,
            activations=self.activations[index - 1][own] if "activations" in needs else None,
            signals={name: values[places] for name, values in self.sequence.signals.items()},
            memory=turn.memory,
        )

    # ------------------------------------------------------------------------ dropping

    def _drop(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Let every turn decide; merged tokens are written into ``hidden``."""
        first = self.positions[0, self.alive.nonzero()[0, 0]]
        merged = hidden.clone()
        for turn in self.turns:
            if sum(turn.totals):
                self._decide(turn, index, hidden, merged, kwargs)
            turn.survivors[index] = turn.places[self.alive[turn.places]]
        hidden.copy_(merged)
        if self.dropper.positions == "compact":
            self.renumbered = True
            self.positions = (first + self.alive.long().cumsum(0) - 1)[None]

    def _decide(self, turn: Turn, index: int, hidden: Tensor, merged: Tensor, kwargs: dict[str, Any]) -> None:
        method = self.dropper
        own, tokens = self._tokens(turn, self.requests[index], index, hidden, kwargs, method.needs)
        decision: Keep | None = method(tokens, self.events[index])
        if decision is None:
            return
        candidates = own[tokens.candidates]
        survivors = candidates[decision.indices]
        self.alive[candidates] = False
        self.alive[survivors] = True
        if decision.features is not None:
            for place, feature in zip(survivors.tolist(), decision.features, strict=True):
                if not bool(feature.isnan().any()):
                    merged[0, place] = feature

    # ------------------------------------------------------------------------ going around

    def _route(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Let every turn choose; return who takes part, and what enters the layer."""
        method, part, entering = self.bypass, self.alive.clone(), hidden.clone()
        gate, skipped = torch.ones(len(part)), torch.ones(len(part))
        for turn in self.turns:
            if not sum(turn.totals):
                continue
            own, tokens = self._tokens(
                turn, self.ways[index], index, hidden, kwargs, method.needs, text_too=method.routes_text
            )
            route = method.route(tokens, index, self.depth)
            candidates = own[tokens.candidates]
            part[candidates] = False
            part[candidates[route.selected]] = True
            if route.gate is not None:
                gate[candidates] = route.gate
            if route.skipped is not None:
                skipped[candidates] = route.skipped
            if route.states is not None:
                frozen = ~part[candidates]
                entering[0, candidates[frozen]] = route.states[frozen]
        around = hidden * torch.where(part, 1.0, skipped)[None, :, None]
        layer = self.layers[index]
        if method.routes_decode and any(sum(turn.totals) for turn in self.turns):
            # Tokens after the prompt come one at a time, and none of them knows of the others.
            generated = torch.arange(self.sequence.prompt, len(part))
            chosen = method.decode_route(layer.input_layernorm(hidden)[0, generated], index)
            if chosen is not None:
                part[generated], gate[generated] = chosen != 0, chosen.float()
        self.pending = None if method.bypass == "attention" else (part, around)
        if method.bypass == "attention":
            self.handles.append(_once(layer.self_attn, lambda output: (output[0] * part[None, :, None], *output[1:])))
        # Where a norm follows the feed-forward part, what is added comes out of the norm.
        adds = getattr(layer, "post_feedforward_layernorm", layer.mlp)
        weights = torch.where(part, gate, 1.0)
        self.handles.append(_once(adds, lambda output: output * weights[None, :, None]))
        return part, entering

    def _after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Put back what went around the layer."""
        if self.pending is None:
            return None
        (part, around), self.pending = self.pending, None
        states = output[0] if isinstance(output, tuple) else output
        states = torch.where(part[None, :, None], states, around)
        return (states, *output[1:]) if isinstance(output, tuple) else states


def _reads(request: LayerRequest | None, index: int) -> bool:
    """Say whether a request wants layer ``index`` read without rotation before it runs."""
    return request is not None and request.layer == index and not request.ahead and not request.rotary


def _once(module: nn.Module, change: Any) -> Any:
    """Change the next output of a module."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        handle.remove()
        return change(output)

    handle = module.register_forward_hook(after)
    return handle


def additive(visible: Tensor, bias: Tensor) -> Tensor:
    """Write a bool mask as eager attention reads it."""
    return bias.masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
