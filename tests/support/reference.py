"""What a pruned model must compute, worked out without any of the code that prunes it.

One row at a time and without padding or cache: before the language model the sequence is cut by hand; inside
it the full length runs on, and masks hide the dropped columns from their layer on. Attention is eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM, LayerDropper, LayerEvent, LayerTokens
from mmfast.tokens import Layout, VisualTokens
from support.families import Batch
from support.prompts import IMAGE, VIDEO, Media, ids_of


@dataclass(frozen=True)
class Item:
    """One image or video in a prompt: the places of its visual tokens, and where they lie in the picture."""

    modality: str
    slots: Tensor
    layout: Layout


@dataclass(frozen=True)
class Expected:
    """What comes out.

    Attributes:
        logits: ``[T + 1, V]`` after the prompt and after each of the T given tokens.
        inner: ``[n, V]`` after each token of the prompt that entered the decoder.
        alive: per layer, the places in the unpadded prompt that it reads.
        items: the images and videos of the prompt.
    """

    logits: Tensor
    inner: Tensor
    alive: list[Tensor]
    items: list[Item]


class _Seen(Exception):
    """The decoder's inputs have been seen; nothing more needs to run."""


def items_of(batch: Batch) -> list[Item]:
    """Find the images and videos of a batch of one row."""
    found, start = [], 0
    ids = torch.tensor(batch.ids[0])
    for piece in batch.rows[0]:
        if not isinstance(piece, Media):
            start += len(ids_of(piece))
            continue
        own = ids[start : start + len(piece.ids)]
        places = (own == (IMAGE if piece.modality == "image" else VIDEO)).nonzero().squeeze(-1) + start
        parts = places.split([len(layout) for layout in piece.layouts])
        found += [Item(piece.modality, *part) for part in zip(parts, piece.layouts, strict=True)]
        start += len(piece.ids)
    return found


def decoder_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the model hands its decoder."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Seen

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def expected(
    batch: Batch, plan: str, given: Sequence[int] = (), turns: Sequence[tuple[int, int]] | None = None
) -> Expected:
    """Compute what one row must give under a plan.

    Args:
        batch: one row.
        plan: text of the plan.
        given: tokens that follow the prompt.
        turns: begin and end of each call that brought images, where there were several; inside the
            language model each decides about its own.
    """
    methods = Plan.parse(plan).methods
    before = next((method for method in methods if isinstance(method, BeforeLLM)), None)
    dropper = next((method for method in methods if isinstance(method, LayerDropper)), None)
    run = _Run(batch, list(given))
    if before is not None:
        run.cut(before)
    logits, alive = run.decode(dropper, turns or [(0, run.length)])
    prompt = len(run.slots)
    return Expected(logits[prompt - 1 :], logits[:prompt], alive, run.items)


class _Run:
    """One row on its way through the decoder."""

    def __init__(self, batch: Batch, given: list[int]) -> None:
        self.family = batch.family
        self.model = batch.family.model("eager")
        self.decoder = self.model.get_decoder()
        seen = decoder_inputs(self.model, batch.inputs)
        self.items = items_of(batch)
        self.given = given
        self.embeds: Tensor = seen["inputs_embeds"][0]
        length = self.embeds.shape[0]
        self.slots = torch.arange(length)
        positions = seen.get("position_ids")
        self.positions = torch.arange(length)[None] if positions is None else positions
        mask = seen.get("attention_mask")
        masks = mask if isinstance(mask, dict) else {"full_attention": mask}
        self.visible = {kind: _visible(value, length) for kind, value in masks.items()}
        self.by_kind = isinstance(mask, dict)
        config, window = self.decoder.config, self.family.window
        if window is None:
            self.kinds = ["full_attention"] * len(self.decoder.layers)
        else:
            every = ["sliding_attention"] * len(self.decoder.layers)
            self.kinds = getattr(config, "layer_types", None) or every
            near = self.slots > self.slots[:, None] - window
            self.visible.setdefault("sliding_attention", self.visible["full_attention"] & near)
        self.deepstack = seen.get("deepstack_visual_embeds")
        self.visual = torch.zeros(length, dtype=torch.bool)
        for item in self.items:
            self.visual[item.slots] = True
        self.length = length

    # ------------------------------------------------------------ before the decoder

    def cut(self, method: BeforeLLM) -> None:
        """Take tokens out of the sequence."""
        keep = torch.ones(self.length, dtype=torch.bool)
        signals = {"text_embeds": self.embeds[~self.visual]} if "text_embeds" in method.needs else {}
        embeds = self.embeds.clone()
        for index, item in enumerate(self.items):
            decision = method(VisualTokens(self.embeds[item.slots], item.layout, index, signals))
            if decision is None:
                continue
            kept = item.slots[decision.indices]
            keep[item.slots] = False
            keep[kept] = True
            if decision.features is not None:
                for place, feature in zip(kept.tolist(), decision.features, strict=True):
                    embeds[place] = embeds[place] if bool(feature.isnan().any()) else feature
        if bool(keep.all()):
            return
        first = self.positions[..., 0]
        self.embeds, self.positions = embeds[keep], self.positions[..., keep]
        self.slots = self.slots[keep]
        if self.deepstack is not None:
            self.deepstack = [features[keep[self.visual]] for features in self.deepstack]
        self.visual = self.visual[keep]
        self.visible = {kind: mask[keep][:, keep] for kind, mask in self.visible.items()}
        if method.positions == "compact" or (method.positions is None and self.family.renumbers):
            self.positions = first[..., None] + torch.arange(len(self.slots))

    # ------------------------------------------------------------- inside the decoder

    def decode(self, dropper: LayerDropper | None, turns: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """Run the decoder over the prompt and the given tokens."""
        extra = len(self.given)
        embeds = self.embeds
        positions = self.positions
        if extra:
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor(self.given))])
            positions = torch.cat([positions, self._following(extra)], dim=-1)
        visible = {kind: self._extended(mask, kind, extra) for kind, mask in self.visible.items()}
        layers = _Layers(self, dropper, visible, positions, turns)
        arguments: dict[str, Any] = {"inputs_embeds": embeds[None], "position_ids": positions, "use_cache": False}
        ready = {kind: _additive(mask) for kind, mask in visible.items()}
        arguments["attention_mask"] = ready if self.by_kind else ready["full_attention"]
        if self.deepstack is not None:
            arguments["deepstack_visual_embeds"] = self.deepstack
            none = torch.zeros(extra, dtype=torch.bool)
            arguments["visual_pos_masks"] = torch.cat([self.visual, none])[None]
        with layers:
            hidden = self.decoder(**arguments).last_hidden_state[0]
        return self.model.lm_head(hidden), layers.history

    def _following(self, count: int) -> Tensor:
        """Positions of the tokens after the prompt: one after the other from the largest."""
        steps = torch.arange(1, count + 1)
        last = self.positions.amax(dim=-1, keepdim=True)
        if self.positions.ndim == 3:
            # Time, row and column go on together; a fourth row in front counts tokens.
            last[-3:] = last[-3:].amax()
        return last + steps

    def _extended(self, mask: Tensor, kind: str, count: int) -> Tensor:
        """Let given tokens see the prompt and each other, as far as the window reaches."""
        prompt = len(mask)
        bigger = torch.ones(prompt + count, prompt + count, dtype=torch.bool).tril()
        bigger[:prompt, :prompt] = mask
        if kind == "sliding_attention":
            slots = torch.cat([self.slots, self.length + torch.arange(count)])
            bigger[prompt:] &= slots > slots[prompt:, None] - self.family.window
        return bigger


class _Layers:
    """Hooks of the reference: another mask per layer, and the decisions of a dropper."""

    def __init__(
        self,
        run: _Run,
        dropper: LayerDropper | None,
        visible: dict[str, Tensor],
        positions: Tensor,
        turns: Sequence[tuple[int, int]],
    ) -> None:
        self.run, self.dropper, self.visible, self.positions = run, dropper, visible, positions
        self.layers = run.decoder.layers
        self.alive = torch.ones(len(run.slots) + len(run.given), dtype=torch.bool)
        events = [] if dropper is None else dropper.events(len(self.layers))
        self.events = {event.layer: event for event in events}
        # Places of each turn in the sequence that entered the decoder.
        self.turns = [((run.slots >= begin) & (run.slots < end)).nonzero().squeeze(-1) for begin, end in turns]
        self.weights: dict[int, Tensor] = {}
        self.history: list[Tensor] = []
        self.renumbered = False
        # Newline tokens enter, but no layer drops them.
        self.media = torch.full((len(self.alive),), -1)
        for index, item in enumerate(run.items):
            self.media[: len(run.slots)][torch.isin(run.slots, item.slots[~item.layout.is_newline])] = index

    def __enter__(self) -> None:
        self.handles = []
        for index, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self.handles.append(layer.self_attn.register_forward_hook(self._read(index)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _read(self, index: int) -> Any:
        def after(module: Any, args: Any, output: Any) -> None:
            self.weights[index] = output[1][0]

        return after

    def _before(self, index: int) -> Any:
        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            event = self.events.get(index)
            if event is not None:
                first = self.positions[0, self.alive.nonzero()[0, 0]]
                for turn in self.turns:
                    # What earlier turns dropped here is no longer in this layer's cache.
                    weights = self._weights(event, layer, hidden, kwargs)
                    self.alive[self._dropped(turn, event, hidden, weights)] = False
                if self.dropper.positions == "compact":
                    self.renumbered = True
                    self.positions = (first + self.alive.long().cumsum(0) - 1)[None]
            self.history.append(self.run.slots[self.alive[: len(self.run.slots)]])
            return args, self._arguments(index, hidden, kwargs)

        return before

    def _arguments(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        new = {**kwargs, "attention_mask": _additive(self.visible[self.run.kinds[index]] & self.alive)}
        if self.renumbered:
            new["position_embeddings"] = self.run.decoder.rotary_emb(hidden, self.positions)
        return new

    def _weights(self, event: LayerEvent, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Attention ``[H, n, n]`` of the layer that the dropper wants to read."""
        request = self.dropper.rows(event)
        if request is None:
            return None
        if not request.ahead:
            return self.weights[request.layer]
        arguments = self._arguments(event.layer, hidden, kwargs)
        arguments["hidden_states"] = layer.input_layernorm(hidden)
        return layer.self_attn(**arguments)[1][0]

    def _dropped(self, turn: Tensor, event: LayerEvent, hidden: Tensor, weights: Tensor | None) -> Tensor:
        """Places that one turn drops at an event."""
        alive = turn[self.alive[turn]]
        media = self.media[turn]
        present = media[media >= 0].unique()
        if not len(present):
            return turn[:0]
        candidates = (self.media[alive] >= 0).nonzero().squeeze(-1)
        number = torch.full_like(self.media, -1)
        number[turn[media >= 0]] = torch.arange(int((media >= 0).sum()))
        totals = tuple(int((media == item).sum()) for item in present)
        chosen = self.dropper(
            LayerTokens(
                hidden=hidden[0, alive],
                candidates=candidates,
                origin=number[alive[candidates]],
                media=self.media[alive[candidates]] - present[0],
                total=sum(totals),
                media_totals=totals,
                attention_rows=None if weights is None else weights[:, turn[-1]][:, alive],
            ),
            event,
        )
        if chosen is None:
            return turn[:0]
        stays = torch.zeros(len(alive), dtype=torch.bool)
        stays[chosen] = True
        stays[self.media[alive] < 0] = True
        return alive[~stays]


def _visible(mask: Tensor | None, length: int) -> Tensor:
    """Read a mask as ``[S, S]`` bool; one that is missing or two-dimensional is causal."""
    if mask is None or mask.ndim == 2:
        return torch.ones(length, length, dtype=torch.bool).tril()
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


def _additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
