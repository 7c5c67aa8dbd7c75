"""What a pruned model must compute, worked out without any of the code that prunes it.

One row at a time and without padding or cache: before the language model the sequence is cut by hand; inside
it the full length runs on, and masks hide the dropped columns from their layer on. Attention is eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM, Method
from mmfast.token_pruning.compression_base import Compressor
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerMask
from mmfast.tokens import Keep, Layout, VisualTokens
from support.families import Batch
from support.prompts import IMAGE, VIDEO, VOCO, Media, ids_of
from support.shrunken import acting, shrunken
from support.stack import Passage, Stack, Turn, Work, additive
from support.tower import Tower


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
        work: per layer, the places in the unpadded prompt that it works on.
        items: the images and videos of the prompt.
    """

    logits: Tensor
    inner: Tensor
    work: list[Work]
    items: list[Item]

    @property
    def alive(self) -> list[Tensor]:
        """Per layer, the places of the tokens that no layer has dropped so far."""
        return [work.alive for work in self.work]


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
    batch: Batch,
    plan: str | Sequence[Method],
    given: Sequence[int] = (),
    turns: Sequence[tuple[int, int]] | None = None,
) -> Expected:
    """Compute what one row must give under a plan.

    Args:
        batch: one row.
        plan: the plan.
        given: tokens that follow the prompt.
        turns: begin and end of each call that brought images, where there were several; inside the
            language model each decides about its own.
    """
    plan = Plan.of(plan)
    run = _Run(batch, list(given), plan)
    if run.before is not None:
        run.cut(run.before)
    logits, work = run.decode(turns or [(0, run.length)])
    prompt = len(run.slots)
    return Expected(logits[prompt - 1 :], logits[:prompt], work, run.items)


class _Run:
    """One row on its way through the decoder."""

    def __init__(self, batch: Batch, given: list[int], plan: Plan) -> None:
        self.batch, self.family, self.given = batch, batch.family, given
        self.before, self.dropper, self.bypass, self.mask = (
            next((method for method in plan.methods if isinstance(method, kind)), None)
            for kind in (BeforeLLM, LayerDropper, LayerBypass, LayerMask)
        )
        self.model = batch.family.model("eager")
        self.decoder = self.model.get_decoder()
        self.items = items_of(batch)
        shrinking = acting(self.before, self.family.name)
        self.before = shrinking or self.before
        with nullcontext() if shrinking is None else shrunken(self.model, shrinking, self.items) as self.shrunken:
            seen = decoder_inputs(self.model, batch.inputs)
        self.embeds: Tensor = seen["inputs_embeds"][0]
        self.length = self.embeds.shape[0]
        self.slots = torch.arange(self.length)
        positions = seen.get("position_ids")
        self.positions = torch.arange(self.length)[None] if positions is None else positions
        mask = seen.get("attention_mask")
        masks = mask if isinstance(mask, dict) else {"full_attention": mask}
        self.visible = {kind: _visible(value, self.length) for kind, value in masks.items()}
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
        self.visual = torch.zeros(self.length, dtype=torch.bool)
        # Newline tokens enter the decoder, but no layer drops them.
        self.media = torch.full((self.length,), -1)
        self.sizes = torch.ones(self.length)
        for index, item in enumerate(self.items):
            self.visual[item.slots] = True
            self.media[item.slots[~item.layout.is_newline]] = index

    @cached_property
    def tower(self) -> Tower:
        """The vision tower; it runs again only for methods that read it."""

        def embed() -> Tensor:
            return decoder_inputs(self.model, self.batch.inputs)["inputs_embeds"][0]

        return Tower(self.model, embed, self.visual.nonzero().squeeze(-1).tolist())

    def signals(self, method: Method | None) -> dict[str, Tensor]:
        """Signals of the vision tower, ``[S, ...]`` each, zero where no visual token is."""
        found = {}
        requests = {} if method is None or not self.items else method.vision_signals()
        for name, request in requests.items():
            if request.kind == "cls_features":
                continue
            if self.shrunken is not None:
                found[name] = self._of_fewer(request.kind)
                continue
            own = self.tower.signal(request)
            rows = torch.zeros(self.length, *next(iter(own.values())).shape)
            for slot, value in own.items():
                rows[slot] = value
            found[name] = rows
        return found

    def _of_fewer(self, kind: str) -> Tensor:
        """A signal ``[S]`` of an encoder that ran on fewer tokens."""
        found = self.shrunken.groups if kind == "groups" else self.shrunken.attention
        waiting = {modality: list(parts) for modality, parts in found.items()}
        rows: Tensor = torch.zeros(self.length, dtype=next(iter(waiting.values()))[0].dtype)
        for item in self.items:
            rows[item.slots] = waiting[item.modality].pop(0)
        return rows

    # ------------------------------------------------------------ before the decoder

    def cut(self, method: BeforeLLM) -> None:
        """Take tokens out of the sequence."""
        keep = torch.ones(self.length, dtype=torch.bool)
        embeds = self.embeds.clone()
        signals = self.signals(method)
        for index, item in enumerate(self.items):
            decision = method(self._tokens(method, index, item, signals))
            if decision is None:
                continue
            kept = item.slots[decision.indices]
            keep[item.slots] = False
            keep[kept] = True
            if decision.sizes is not None:
                self.sizes[kept] = decision.sizes.float()
            for place, feature in self._merged(kept.tolist(), decision).items():
                embeds[place] = feature
        if bool(keep.all()) and torch.equal(embeds, self.embeds):
            return
        first = self.positions[..., 0]
        self.embeds, self.positions = embeds[keep], self.positions[..., keep]
        self.slots, self.media, self.sizes = self.slots[keep], self.media[keep], self.sizes[keep]
        if self.deepstack is not None:
            self.deepstack = [features[keep[self.visual]] for features in self.deepstack]
        self.visual = self.visual[keep]
        self.visible = {kind: mask[keep][:, keep] for kind, mask in self.visible.items()}
        if method.positions == "compact" or (method.positions is None and self.family.renumbers):
            self.positions = first[..., None] + torch.arange(len(self.slots))

    def _tokens(self, method: BeforeLLM, index: int, item: Item, signals: dict[str, Tensor]) -> VisualTokens:
        own = {name: values[item.slots] for name, values in signals.items()}
        if "text_embeds" in method.needs:
            own["text_embeds"] = self.embeds[~self.visual]
        for name, request in method.vision_signals().items():
            if request.kind == "cls_features" and self.tower.has_class:
                own[name] = self.tower.class_features(request, item.slots.tolist())
        patches = method.vision_signals().get("patch_features")
        read = patches is not None and self.tower.layer_of(patches) == self.tower.features
        projectable = read and self.tower.projectable(item.slots.tolist())
        return VisualTokens(self.embeds[item.slots], item.layout, index, own, projectable)

    def _merged(self, kept: list[int], decision: Keep) -> dict[int, Tensor]:
        """Embeddings of the tokens that were merged; rows of NaN mark those that were not."""
        if decision.features is None:
            return {}
        features = {
            place: feature
            for place, feature in zip(kept, decision.features, strict=True)
            if not bool(feature.isnan().any())
        }
        return features if decision.space == "llm" else self.tower.project(features)

    # ------------------------------------------------------------- inside the decoder

    def decode(self, turns: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Work]]:
        """Run the decoder over the prompt and the given tokens."""
        passage = self._passage(turns)
        arguments = self._arguments(passage)
        done: list[Turn] | None = None
        truncates = self.dropper is not None and bool(self.dropper.truncations(len(self.decoder.layers)))
        for _ in range(1 + truncates):
            # What the tokens after a prompt find in truncated caches is known only once all have decided.
            own = [self._turn(*turn) for turn in turns]
            stack = Stack(passage, self.dropper, self.bypass, own, done)
            with stack:
                hidden = self.decoder(**arguments).last_hidden_state[0]
            done = own
        return self.model.lm_head(hidden), stack.history

    def _passage(self, turns: Sequence[tuple[int, int]]) -> Passage:
        extra = len(self.given)
        embeds, positions = self.embeds, self.positions
        if extra:
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor(self.given))])
            positions = torch.cat([positions, self._following(extra)], dim=-1)
        visible = {kind: self._extended(mask, kind, extra) for kind, mask in self.visible.items()}
        if self.mask is not None:
            for begin, end in turns:
                self._unhide(visible, begin, end)
        media = torch.cat([self.media, torch.full((extra,), -1)])
        signals = {name: rows[self.slots] for name, rows in self.signals(self.dropper or self.bypass).items()}
        return Passage(
            self.decoder,
            self.kinds,
            visible,
            positions,
            embeds,
            len(self.slots),
            self.slots,
            media,
            signals,
            self._bias(),
        )

    def _arguments(self, passage: Passage) -> dict[str, Any]:
        arguments = {"inputs_embeds": passage.embeds[None], "position_ids": passage.positions, "use_cache": False}
        ready = {kind: additive(mask, passage.bias) for kind, mask in passage.visible.items()}
        arguments["attention_mask"] = ready if self.by_kind else ready["full_attention"]
        if self.deepstack is not None:
            arguments["deepstack_visual_embeds"] = self.deepstack
            none = torch.zeros(len(self.given), dtype=torch.bool)
            arguments["visual_pos_masks"] = torch.cat([self.visual, none])[None]
        return arguments

    def _bias(self) -> Tensor:
        """What calibration adds to the logits: the logarithm of ``s (2 - D(t))`` for a key of size s at distance t."""
        extra = len(self.given)
        slots = torch.cat([self.slots, self.length + torch.arange(extra)])
        sizes = torch.cat([self.sizes, torch.ones(extra)])
        wanted = getattr(self.before, "calibrate", False)
        possible = self.family.renumbers and not (self.dropper or self.bypass or self.mask)
        if not (possible if wanted is None else wanted) or bool((sizes == 1).all()):
            return torch.zeros(len(slots), len(slots))
        angles = (slots[:, None] - slots).abs()[..., None] * self.decoder.rotary_emb.inv_freq.double()
        return (sizes * (2 - angles.cos().mean(dim=-1))).log().float()

    def _turn(self, begin: int, end: int) -> Turn:
        """Find the tokens of one call, and what of its images and videos entered."""
        places = ((self.slots >= begin) & (self.slots < end)).nonzero().squeeze(-1)
        layouts, totals = [], []
        for index, item in enumerate(self.items):
            own = self.slots[places[self.media[places] == index]]
            if begin <= int(item.slots[0]) < end:
                layouts.append(item.layout.take(torch.isin(item.slots, own)))
                totals.append(len(own))
        return Turn(begin, places, tuple(layouts), tuple(totals))

    def _unhide(self, visible: dict[str, Tensor], begin: int, end: int) -> None:
        """Let the tokens of one call see what a method wants them to see."""
        own = self.slots[(self.slots >= begin) & (self.slots < end)]
        media = [item.slots for item in self.items if begin <= int(item.slots[0]) < end]
        if not media:
            return
        text = own[~torch.isin(own, torch.cat(media))]
        if isinstance(self.mask, Compressor):
            marked = text[torch.tensor(self.batch.ids[0])[text] == VOCO]
            for one in self.mask.hidden(media, text, marked):
                # Tokens after the prompt have no slot of their own.
                places = torch.cat([self.slots, self.length + torch.arange(len(self.given))])
                for mask in visible.values():
                    mask[(places >= one.start)[:, None] & torch.isin(places, one.places)] = False
            return
        for rows, columns in self.mask.visible(media, text):
            seeing = torch.isin(self.slots, rows).nonzero().squeeze(-1)
            seen = torch.isin(self.slots, columns).nonzero().squeeze(-1)
            for kind, mask in visible.items():
                # A sliding window ends where it ends, whoever looks.
                reach = self.family.window if kind == "sliding_attention" else self.length
                near = self.slots[seen] > self.slots[seeing, None] - reach
                mask[seeing[:, None], seen] |= near

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


def _visible(mask: Tensor | None, length: int) -> Tensor:
    """Read a mask as ``[S, S]`` bool; one that is missing or two-dimensional is causal."""
    if mask is None or mask.ndim == 2:
        return torch.ones(length, length, dtype=torch.bool).tril()
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
