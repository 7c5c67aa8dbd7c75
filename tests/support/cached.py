"""What a model must compute whose cache is evicted, packed or read in part, worked out beside the code that does it.

One row at a time, without padding, with the full cache of transformers and eager attention: entries that are
gone are hidden head by head, changed ones are written over, and nothing is ever moved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from mmfast.kv.base import Adjuster, Evictor, Forgetter, ModelEvictor, Packer, Retriever
from mmfast.kv.entries import Entries, Retained, Rotation, Step, rotate
from mmfast.plan import Plan
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import Method
from support.families import Batch
from support.reference import items_of


class Forced(LogitsProcessor):
    """Generate these tokens, whatever the model would."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.step = list(tokens), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == len(self.tokens):
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[self.step]] = 0.0
        self.step += 1
        return forced


@dataclass
class LayerState:
    """One layer of the reference.

    Attributes:
        query, key, value: ``[heads, n, d]`` of the prompt.
        kept: bool ``[G, n + T]``, what is there.
        keys, values: what is written over the entries of the prompt; None = nothing.
        bias: ``[G, n]``.
        memory: what the method remembers.
        shift: by how much later positions are lowered.
        loose: per side, the place of the first entry that is not packed.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kept: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    shift: int = 0
    loose: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Remembered:
    """What comes out.

    Attributes:
        logits: ``[T + 1, V]`` after the prompt and after each of the T given tokens.
        layers: layer index -> its state at the end; sliding layers are not among them.
    """

    logits: Tensor
    layers: dict[int, LayerState]


@torch.no_grad()
def remembered(batch: Batch, plan: str | Sequence[Method], given: Sequence[int]) -> Remembered:
    """Compute what one row must give under methods of the cache.

    Args:
        batch: one row.
        plan: methods of the cache alone.
        given: tokens that follow the prompt.
    """
    run = _Run(batch, Plan.of(plan))
    with run:
        logits = run.generate(list(given))
    return Remembered(logits, run.layers)


class _Run:
    def __init__(self, batch: Batch, plan: Plan) -> None:
        self.batch, self.model = batch, batch.family.model("eager")
        self.decoder = self.model.get_decoder()
        self.items = items_of(batch)

        def only(kind: type) -> Any:
            return next((method for method in plan.methods if isinstance(method, kind)), None)

        self.evictor: Evictor | None = only(Evictor)
        self.retriever: Retriever | None = only(Retriever)
        self.packer: Packer | None = only(Packer)
        self.forgetter: Forgetter | None = only(Forgetter)
        self.adjusters = [method for method in plan.methods if isinstance(method, Adjuster)]
        self.length = len(batch.ids[0])
        self.depth = len(self.decoder.layers)
        self.layers: dict[int, LayerState] = {}
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.decided = False
        kinds = getattr(self.decoder.config, "layer_types", None)
        window = batch.family.window
        every = "full_attention" if window is None else "sliding_attention"
        self.kinds = kinds or [every] * self.depth

    def __enter__(self) -> None:
        modules = [layer.self_attn for layer in self.decoder.layers]
        self.index = {module: index for index, module in enumerate(modules)}
        self.file = sys.modules[type(modules[0]).__module__]
        self.original = self.file.eager_attention_forward
        self.file.eager_attention_forward = self._attend
        self.handles = [module.register_forward_pre_hook(self._note_tables, with_kwargs=True) for module in modules]
        if self.forgetter is not None:
            layer = self.decoder.layers[self.forgetter.first_layer(self.depth)]
            self.handles.append(layer.register_forward_pre_hook(self._weigh, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        self.file.eager_attention_forward = self.original
        for handle in self.handles:
            handle.remove()

    def _weigh(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.stays = bool(self.forgetter.remember(hidden[:, -1])[0])

    def generate(self, given: list[int]) -> Tensor:
        cache = DynamicCache(config=self.decoder.config)
        output = self.model.generate(
            **self.batch.inputs,
            past_key_values=cache,
            max_new_tokens=len(given) + 1,
            do_sample=False,
            logits_processor=[Forced(given)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, dim=1)[0]

    # ------------------------------------------------------------------ attention

    def _note_tables(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cos, sin = kwargs["position_embeddings"]
        if cos.shape[-2] > 1:
            self.tables[self.index[module]] = (cos[0], sin[0])
            positions = kwargs.get("position_ids")
            positions = torch.arange(self.length) if positions is None else positions.reshape(-1, self.length)
            self.first, self.following = int(positions.flatten()[0]), int(positions.max()) + 1

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = self.index.get(module)
        if index is None or self.kinds[index] == "sliding_attention" or not self.items:
            return self.original(module, query, key, value, *args, **kwargs)
        if query.shape[2] > 1:
            kept = torch.ones(key.shape[1], key.shape[2], dtype=torch.bool)
            self.layers[index] = LayerState(query[0], key[0], value[0], kept)
            self.scaling, self.softcap = kwargs.get("scaling"), kwargs.get("softcap")
            mask = args[0] if args else kwargs["attention_mask"]
            self.mask = None if mask is None else mask[0, 0]
            return self.original(module, query, key, value, *args, **kwargs)
        if not self.decided:
            self.decided = True
            self._decide()
        kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            # The family's own function: what is quantised must be equal to the last bit.
            return self.original(module, query[None], key[None], value[None], mask, **kwargs)[0]

        return self._decode(index, query[0], key[0].clone(), value[0].clone(), attend), None

    def _decode(self, index: int, query: Tensor, key: Tensor, value: Tensor, attend: Any) -> Tensor:
        state = self.layers[index]
        added = key.shape[1] - self.length
        state.kept = torch.cat([state.kept, torch.ones_like(state.kept[:, :1])], dim=-1)
        if state.shift:
            query, key = self._lowered(index, state, query, key, added)
        # What was written over includes packed tokens that were generated.
        for own, over in ((key, state.keys), (value, state.values)):
            if over is not None:
                own[:, : over.shape[1]] = over
        group = query.shape[0] // key.shape[0]
        visible = state.kept.repeat_interleave(group, dim=0)
        if self.retriever is not None and index >= self.retriever.dense_layers:
            visible = visible & self._chosen(index, state, query, key, value, added)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        if state.bias is not None:
            mask += torch.nn.functional.pad(state.bias, (0, added)).repeat_interleave(group, dim=0)
        mixed = attend(query, key, value, mask[None, :, None])
        if self.forgetter is not None and index >= self.forgetter.first_layer(self.depth):
            state.kept[:, -1] = self.stays
        if self.evictor is not None and self.evictor.decodes:
            self._step(index, state, query, key, value, added)
        if self.packer is not None:
            self._pack_due(state, key, value)
        return mixed

    def _chosen(self, index: int, state: LayerState, query: Tensor, key: Tensor, value: Tensor, added: int) -> Tensor:
        stored, gathered = self._stored(state, key, value)
        step = self._as_step(index, state, query, *gathered, added)
        chosen = self.retriever.choose(step)
        visible = torch.ones(query.shape[0], key.shape[1], dtype=torch.bool)
        if chosen is None:
            return visible
        chosen = (chosen if chosen.ndim == 2 else chosen[None]).clone()
        chosen[:, -1] = True
        chosen = chosen.repeat_interleave(query.shape[0] // chosen.shape[0], dim=0)
        group = query.shape[0] // key.shape[0]
        visible[:] = False
        return visible.scatter(1, stored.repeat_interleave(group, dim=0), chosen)

    def _step(self, index: int, state: LayerState, query: Tensor, key: Tensor, value: Tensor, added: int) -> None:
        stored, gathered = self._stored(state, key, value)
        stays = self.evictor.step(self._as_step(index, state, query, *gathered, added))
        if stays is None:
            return
        stays = stays.expand(key.shape[0], -1)
        state.kept = state.kept.scatter(1, stored, stays & state.kept.gather(1, stored))
        size = stored.shape[1]
        for name, tensor in state.memory.items():
            if tensor.ndim and tensor.shape[-1] == size:
                rows = [one[stays[i if tensor.ndim > 1 else 0]] for i, one in enumerate(tensor.reshape(-1, size))]
                state.memory[name] = torch.stack(rows).reshape(*tensor.shape[:-1], -1)

    def _stored(self, state: LayerState, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Places of what a compact cache would hold, ``[G, P]``, and its keys and values."""
        places = torch.stack([row.nonzero().squeeze(-1) for row in state.kept])
        wide = places[..., None].expand(-1, -1, key.shape[-1])
        return places, (key.gather(1, wide), value.gather(1, wide))

    def _as_step(self, index: int, state: LayerState, query: Tensor, keys: Tensor, values: Tensor, added: int) -> Step:
        return Step(
            keys,
            values,
            query,
            self.length + added,
            added,
            index,
            self.depth,
            None,
            self.scaling,
            self.softcap,
            state.memory,
        )

    def _lowered(self, index: int, state: LayerState, query: Tensor, key: Tensor, added: int) -> tuple[Tensor, Tensor]:
        """Number generated tokens on from what is left."""
        rotation = self._rotation(index)
        places = torch.arange(self.length, self.length + added)
        old, new = rotation.at(places), rotation.at(places - state.shift)
        turned = rotate(Rotation(*old, rotation.at).undo(key[:, self.length :]), *new)
        last = Rotation(old[0][-1:], old[1][-1:], rotation.at)
        return rotate(last.undo(query), new[0][-1:], new[1][-1:]), torch.cat([key[:, : self.length], turned], dim=1)

    # ------------------------------------------------------------------- decisions

    def _rotation(self, index: int) -> Rotation:
        cos, sin = self.tables[index]
        # Where some layers slide, these have frequencies of their own.
        kind = [self.kinds[index]] if "sliding_attention" in self.kinds else []

        def at(places: Tensor) -> tuple[Tensor, Tensor]:
            places = torch.where(places < self.length, places + self.first, places - self.length + self.following)
            wide = places[None] if self.batch.family.name in _PLAIN else places.expand(3, 1, -1)
            found = self.decoder.rotary_emb(cos[None], wide, *kind)
            return found[0][0], found[1][0]

        return Rotation(cos, sin, at)

    def _entries(self, index: int) -> Entries:
        state = self.layers[index]
        media = torch.full((self.length,), -1)
        frame = media.clone()
        for number, item in enumerate(self.items):
            media[item.slots] = number
            own = item.layout.frame
            frame[item.slots] = torch.where(own < 0, own.max(), own)
        return Entries(
            state.key,
            state.value,
            media >= 0,
            media,
            frame,
            index,
            self.depth,
            AttentionView(state.query, state.key, state.value, self.scaling, self.softcap, self.mask),
            self._rotation(index),
            self.decoder.layers[index].self_attn.o_proj.weight,
            state.memory,
        )

    def _decide(self) -> None:
        order = sorted(self.layers)
        entries = {index: self._entries(index) for index in order}
        decisions: dict[int, Retained | None] = {}
        if isinstance(self.evictor, ModelEvictor):
            settled = self.evictor.settle([self.evictor.observe(entries[index]) for index in order])
            decisions = dict(zip(order, settled, strict=True))
        elif self.evictor is not None:
            decisions = {index: self.evictor(entries[index]) for index in order}
        for index in order:
            state, retained = self.layers[index], decisions.get(index)
            if self.retriever is not None:
                self.retriever.prepare(entries[index])
            if retained is not None:
                for adjuster in self.adjusters:
                    retained = adjuster.adjust(entries[index], retained)
                    if adjuster.compacts:
                        state.shift = self.length - retained.counts[0]
                state.kept = retained.by_head(state.key.shape[0]).clone()
                state.keys, state.values, state.bias = retained.keys, retained.values, retained.bias
            if self.packer is not None:
                self._pack(entries[index], state)

    # --------------------------------------------------------------------- packing

    def _pack(self, entries: Entries, state: LayerState) -> None:
        places = state.kept.any(dim=0).nonzero().squeeze(-1)
        left = replace(entries.take(places), attention=entries.attention)
        for side, name, states in (("key", "keys", entries.keys), ("value", "values", entries.values)):
            over = getattr(state, name)
            states = (states if over is None else over).clone()
            due = min(self.packer.due(len(places), side), len(places))
            state.loose[side] = due
            if due:
                block = replace(left.take(torch.arange(due)), attention=entries.attention)
                states[:, places[:due]] = self.packer.pack(states[:, places[:due]], side, block).restore()
            setattr(state, name, states)

    def _pack_due(self, state: LayerState, key: Tensor, value: Tensor) -> None:
        places = state.kept.any(dim=0).nonzero().squeeze(-1)
        for side, name, states in (("key", "keys", key), ("value", "values", value)):
            loose = places[state.loose[side] :]
            due = self.packer.due(len(loose), side)
            if due >= 8:
                states[:, loose[:due]] = self.packer.pack(states[:, loose[:due]], side, None).restore()
                state.loose[side] += due
                setattr(state, name, states[:, : int(loose[due - 1]) + 1].clone())


_PLAIN = {
    "llava",
    "vipllava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "internvl",
    "idefics3",
    "smolvlm",
    "mistral3",
    "paligemma",
    "gemma3",
}
"""Families whose positions have one dimension."""
