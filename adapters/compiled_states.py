"""What a compiled decode step reads and writes: tensors of a fixed size at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import reference_layer
from mmfast.kv.cache import Announcement
from mmfast.kv.static import FixedStates, rounded


@dataclass(eq=False)
class Columns:
    """The entries of layers that store the same tokens, one column each.

    Attributes:
        mask: ``[B, 1 or H, 1, C]`` additive; what is not there is hidden.
        end: int64 ``[1]``, the column of the first new token.
        window: length of the sliding window, or None.
        slots: ``[B, C]`` int64 logical places, where a window or a distance counts; else None.
        sizes: ``[B, C]`` float32 logarithms of how many tokens each entry stands for; None = they do not count.
        merged: ``[B, 1]`` bool, the rows in which sizes count.
        lowered: ``[B, 1]`` int64, by how much positions lie below those of the first layer; None = they do not.
    """

    mask: Tensor
    end: Tensor
    window: int | None = None
    slots: Tensor | None = None
    sizes: Tensor | None = None
    merged: Tensor | None = None
    lowered: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def signature(self) -> tuple[Any, ...]:
        """Return what two such have in common that may use the same buffers, but for the number of columns."""
        return self.mask.shape[1], self.window, tuple(self.tensors())

    def emptied(self, capacity: int) -> Columns:
        """Return buffers of ``capacity`` columns for the same."""
        made = {}
        for name, value in self.tensors().items():
            per_column = name in ("mask", "slots", "sizes")
            made[name] = value.new_zeros(*value.shape[:-1], capacity if per_column else value.shape[-1])
        return Columns(window=self.window, **made)

    def take(self, other: Columns) -> None:
        """Copy what another one says of fewer columns; the others are hidden and empty."""
        for name, value in self.tensors().items():
            own = getattr(other, name)
            value.fill_(torch.finfo(value.dtype).min if name == "mask" else 0)
            value[..., : own.shape[-1]] = own


def columns_of(
    cache: Any, dtype: torch.dtype, query_heads: int, *, calibrated: bool
) -> tuple[list[Columns], tuple[int, ...]]:
    """Describe what the layers of a cache store.

    Args:
        cache: one with logical layers.
        dtype: of the masks.
        query_heads: number H.
        calibrated: attention has to know sizes and distances.

    Returns:
        What differs between layers, and the number of its own for each layer.
    """
    found: dict[tuple[Any, ...], Columns] = {}
    keys = []
    reference = reference_layer(cache)
    for index, layer in enumerate(cache.layers):
        window = layer.sliding_window if layer.is_sliding else None
        keys.append((index,) if _alone(layer) else (layer.stored, layer.history, window, layer.renumbered))
        if keys[-1] not in found:
            found[keys[-1]] = _columns(layer, reference, dtype, query_heads, window, calibrated=calibrated)
    order = list(found)
    return list(found.values()), tuple(order.index(key) for key in keys)


def _alone(layer: Any) -> bool:
    """Whether the heads of a layer store different entries or weigh them, so that no other layer is like it."""
    return layer.heads is not None or layer.bias is not None


def _columns(
    layer: Any, reference: Any, dtype: torch.dtype, query_heads: int, window: int | None, *, calibrated: bool
) -> Columns:
    real = layer.real_entries()
    group = query_heads // real.shape[1]
    real = real.repeat_interleave(group, dim=1) if _alone(layer) else real[:, :1]
    mask = torch.zeros(real.shape, dtype=dtype, device=real.device)
    if layer.bias is not None:
        mask = layer.bias.repeat_interleave(group, dim=1).to(dtype)
    columns = Columns(
        mask.masked_fill(~real, torch.finfo(dtype).min)[:, :, None],
        torch.tensor([layer.stored], device=real.device),
        window,
        slots=layer.slots if window is not None or calibrated else None,
    )
    if calibrated:
        sizes = torch.ones(layer.slots.shape, device=real.device) if layer.sizes is None else layer.sizes
        columns.sizes, columns.merged = sizes.log(), (sizes > 1).any(dim=1, keepdim=True)
    if layer.renumbered != reference.renumbered:
        before = 0 if reference.shift is None else reference.shift
        columns.lowered = (layer.shift - before)[:, None]
    return columns


class States:
    """Keys and values of all layers, what each token is to see of them, and the token that comes next.

    Made without content for a shape of prompts; :meth:`load` fills it in.

    Args:
        columns: as they will be loaded.
        columns_of_layers: per layer, the number of its columns.
        layers: layers of a cache like those that will be loaded.
        room: tokens there must be room for beside a prompt.
        positions: ``[B, 1]`` or ``[3 or 4, B, 1]`` int64 position ids of the next token, for their shape.
        vocabulary: number of logits V.
        ends: ``[E]`` int64, the tokens that end an answer; None = none does.

    Attributes:
        token: ``[B, 1]`` int64, the next token to read.
        fill: int64 ``[1]``, how many have been read.
        place: int64 ``[1]``, logical place of the next one.
        logits: ``[B, V]`` float32, those after the last token read.
        answer: ``[B, room]`` int64, what was chosen, where the step chooses.
        unfinished: ``[B]`` bool, answers that have not ended.
        padding: int64 ``[1]``, what follows an answer.
    """

    def __init__(
        self,
        columns: Sequence[Columns],
        columns_of_layers: tuple[int, ...],
        layers: Sequence[Any],
        room: int,
        positions: Tensor,
        vocabulary: int,
        ends: Tensor | None,
    ) -> None:
        batch, device = layers[0].keys.shape[0], layers[0].keys.device
        self.room = room
        self.columns_of_layers = columns_of_layers
        capacities = [rounded(int(own.mask.shape[-1]) + room) for own in columns]
        self.columns = [own.emptied(capacity) for own, capacity in zip(columns, capacities, strict=True)]
        self.keys = [_empty(layer.keys, capacities[own]) for layer, own in zip(layers, columns_of_layers, strict=True)]
        self.values = [
            _empty(layer.values, capacities[own]) for layer, own in zip(layers, columns_of_layers, strict=True)
        ]
        self.positions = torch.zeros_like(positions)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.fill = torch.zeros(1, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, vocabulary, device=device)
        self.answer = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.padding = torch.zeros(1, dtype=torch.int64, device=device)
        self.ends = None if ends is None else ends.clone()

    def resizable(self) -> list[tuple[Tensor, int]]:
        """Return the tensors whose length depends on the prompt, with the axis."""
        found = [(states, 2) for states in (*self.keys, *self.values)]
        for columns in self.columns:
            found += [(value, value.ndim - 1) for name, value in columns.tensors().items() if value.shape[-1] > 1]
        return [*found, (self.answer, 1)]

    def load(self, cache: Any, columns: Sequence[Columns], positions: Tensor, place: int) -> None:
        """Take over a prompt; its layers keep views of it, so that it is there once.

        Args:
            cache: its cache.
            columns: what its layers store.
            positions: position ids of the next token.
            place: its logical place.
        """
        for own, other in zip(self.columns, columns, strict=True):
            own.take(other)
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            stored = layer.stored
            for buffer, states in ((keys, layer.keys), (values, layer.values)):
                buffer[:, :, :stored] = states
                # What is left of another prompt could be infinite, and masks do not hide that.
                buffer[:, :, stored:] = 0
            if not isinstance(layer, FixedStates):
                layer.keys, layer.values = keys[:, :, :stored], values[:, :, :stored]
        self.positions.copy_(positions)
        self.place.fill_(place)
        self.fill.zero_()

    def begin(self, token: Tensor, unfinished: Tensor, padding: int, ends: Tensor | None) -> None:
        """Say what is read first, which rows go on, and how answers end."""
        self.token.copy_(token)
        self.unfinished.copy_(unfinished)
        self.padding.fill_(padding)
        if self.ends is not None and ends is not None:
            self.ends.copy_(ends)

    def store(self, cache: Any, count: int) -> None:
        """Give the layers of the cache the first ``count`` tokens that were read, as if one by one.

        Args:
            cache: the one that was loaded.
            count: tokens.
        """
        batch = self.token.shape[0]
        slots = torch.arange(count, device=self.token.device).expand(batch, count)
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            begin, history = layer.stored, layer.history
            if not count:
                # Views of the states would change with the next prompt.
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                continue
            layer.announced = Announcement(count, None, slots)
            layer.update(keys[:, :, begin : begin + count].clone(), values[:, :, begin : begin + count].clone())
            layer.history = _continued(history, count)


def _continued(history: int, count: int) -> int:
    """Return the history of a layer that has been given tokens one by one."""
    for _ in range(count):
        history = hash((history, 0))
    return history


def _empty(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, width = states.shape
    return states.new_zeros(batch, heads, capacity, width)


class StepCache:
    """What a decoder takes for a cache during a step: writes at a place that a tensor names.

    Args:
        adapter: the adapter of the twin, for positions of layers that count differently.
        states: what to read and write.
        frequencies: ``[d/2]`` rotary frequencies, where the distance of merged tokens counts.
    """

    is_initialized = True
    is_compileable = False

    def __init__(self, adapter: Adapter, states: States, frequencies: Tensor | None) -> None:
        self.adapter, self.states = adapter, states
        self.places = [columns.end + states.fill for columns in states.columns]
        self.masks = [
            _visible(columns, place, states.place, frequencies)
            for columns, place in zip(states.columns, self.places, strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 1: positions and masks are said, so that nothing follows from it but that this is no prompt."""
        return 1

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new entry in place and return the whole buffers."""
        place = self.places[self.states.columns_of_layers[layer]]
        return (
            self.states.keys[layer].index_copy_(2, place, keys.to(self.states.keys[layer].dtype)),
            self.states.values[layer].index_copy_(2, place, values.to(self.states.values[layer].dtype)),
        )

    def fitted(self, layer: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a decoder layer with its own mask and positions."""
        number = self.states.columns_of_layers[index]
        kwargs["attention_mask"] = self.masks[number]
        lowered = self.states.columns[number].lowered
        if lowered is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["position_embeddings"] = self.adapter.rotary(layer, hidden, self.states.positions - lowered)
        return kwargs


def _visible(columns: Columns, column: Tensor, place: Tensor, frequencies: Tensor | None) -> Tensor:
    """Let the next token be seen, and return the mask with which it sees."""
    mask = columns.mask.index_fill_(3, column, 0.0)
    slots = columns.slots
    if slots is None:
        return mask
    slots.index_copy_(1, column, place.expand(slots.shape[0], 1))
    if columns.window is not None:
        mask = mask.masked_fill((slots <= place - columns.window)[:, None, None], torch.finfo(mask.dtype).min)
    if columns.sizes is not None and columns.merged is not None and frequencies is not None:
        distance = (place - slots).abs()
        decay = torch.cos(distance[..., None] * frequencies.float()).mean(dim=-1)
        weights = (2.0 - decay).clamp_min(1e-6).log() + columns.sizes
        mask = mask + torch.where(columns.merged, weights, 0.0)[:, None, None].to(mask.dtype)
    return mask
