"""The vision encoder by other means: its own eager attention, and marked patches followed to the visual tokens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.token_pruning.base import VisionSignal
from support.families import Batch, cast
from support.reference import items_of as layouts_of

ATTENTION = ("cls_attention", "cls_logits", "received_attention")


def encoding_arguments(model: Any, modality: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Pick the arguments of ``get_{modality}_features`` out of the inputs of a model."""
    names = inspect.signature(getattr(model.base_model, f"get_{modality}_features")).parameters
    # llava of transformers 5.17 takes sizes without naming them.
    found = {name: value for name, value in inputs.items() if name in (*names, "image_sizes")}
    if "pixel_values" in names:
        # Releases differ in how they call the pixels of videos, and video_llava in those of images.
        other = "pixel_values_videos" if modality == "video" else "pixel_values_images"
        if other in inputs:
            found.pop(other, None)
            found["pixel_values"] = inputs[other]
    return found


def features(model: Any, modality: str, arguments: dict[str, Any]) -> Tensor:
    """Return all visual tokens of a call, ``[T, D]``."""
    with torch.no_grad():
        output = getattr(model.base_model, f"get_{modality}_features")(**arguments, return_dict=True)
    pooled = output.pooler_output
    pooled = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([item.reshape(-1, item.shape[-1]) for item in pooled])


def blocks_of(model: Any, modality: str) -> list[nn.Module]:
    """Return the blocks of the encoder: its longest list of modules."""
    base = model.base_model
    tower = base.video_tower if modality == "video" and hasattr(base, "video_tower") else None
    tower = tower or model.get_encoder(modality=modality)
    return list(max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len))


@dataclass
class Seen:
    """One call of the family's eager attention function: ``[B, H, n, n]`` and ``[B, H, n, d]``."""

    weights: Tensor
    query: Tensor
    key: Tensor
    scaling: float


@dataclass
class Encoder:
    """One run of the encoder.

    Attributes:
        calls: block -> its calls of the attention function.
        states: block -> its output, flat ``[R, C]``, one row per token of the encoder.
        feeds: per visual token, the rows of the encoder's patches that feed it.
        tiles: rows per tile or sequence, ``[tiles]``.
        cls: whether each tile begins with a class token.
    """

    calls: dict[int, list[Seen]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    feeds: list[list[int]] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    cls: bool = False

    def values(self, spec: VisionSignal, block: int) -> Tensor:
        """Return one row per token of the encoder, ``[R, C]``; NaN where a class token has no value."""
        if spec.kind == "patch_features":
            return self.states[block]
        return torch.cat([part for seen in self.calls[block] for part in self._values(spec, seen)])

    def _values(self, spec: VisionSignal, seen: Seen) -> Iterator[Tensor]:
        for weights, query, key in zip(seen.weights, seen.query, seen.key, strict=True):
            if spec.kind in ("keys", "queries"):
                states = key if spec.kind == "keys" else query
                yield _by_heads(states, spec.heads)
                continue
            logits = query @ key.mT * seen.scaling
            if spec.heads == "join":
                wide_query, wide_key = (_by_heads(states, "join") for states in (query, key))
                logits = (wide_query @ wide_key.mT / wide_key.shape[-1] ** 0.5)[None]
                logits = logits.masked_fill(weights[:1] == 0, -torch.inf)
                weights = logits.softmax(-1)
            if spec.kind in ("cls_attention", "cls_logits") and self.cls:
                row = (weights if spec.kind == "cls_attention" else logits)[:, 0]
                value = row.sum(0) if spec.heads == "sum" else row.mean(0)
            else:
                # Weights of exactly 0 are those of tokens that cannot see each other.
                value = (weights.sum(1) / (weights > 0).sum(1)).sum(0)
                value = value if spec.heads == "sum" else value / len(weights)
            if self.cls:
                value = torch.cat([torch.full((1,), torch.nan), value[1:]])
            yield value[:, None]

    def expected(self, spec: VisionSignal, block: int, keeps_class: bool = False) -> Tensor:
        """Return the signal per visual token, ``[T, C]``: the mean over the patches that feed it."""
        values = self.values(spec, block)
        starts = [sum(self.tiles[:tile]) for tile in range(len(self.tiles))]
        found = []
        for token, feeds in enumerate(self.feeds):
            if feeds:
                found.append(values[feeds].mean(0))
            elif keeps_class:
                # Every tile has as many visual tokens as the encoder has tokens.
                start, length = starts[token // self.tiles[0]], self.tiles[0]
                assert token % length == 0
                own = values[start]
                found.append(values[start + 1 : start + length].mean(0) if bool(own.isnan().any()) else own)
            else:
                found.append(torch.zeros_like(values[0]))
        return torch.stack(found)


def _by_heads(states: Tensor, heads: str) -> Tensor:
    if heads == "join":
        return torch.cat(list(states), dim=-1)
    return states.sum(0) if heads == "sum" else states.mean(0)


@contextmanager
def recorded(model: Any, modality: str, into: Encoder) -> Iterator[None]:
    """Note what the blocks of a model loaded with eager attention do."""
    blocks = blocks_of(model, modality)
    owner = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    attention = {type(module).__module__ for block in blocks for module in block.modules()}
    modelling = next(sys.modules[name] for name in attention if hasattr(sys.modules[name], "eager_attention_forward"))
    original = modelling.eager_attention_forward

    def spy(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, *args, **kwargs)
        if module in owner:
            seen = Seen(weights.float(), query.float(), key.float(), kwargs["scaling"])
            into.calls.setdefault(owner[module], []).append(seen)
        return output, weights

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            into.states[index] = states.reshape(-1, states.shape[-1])

        return hook

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    modelling.eager_attention_forward = spy
    try:
        yield
    finally:
        modelling.eager_attention_forward = original
        for handle in handles:
            handle.remove()


@contextmanager
def unmixed(model: Any, modality: str, into: list[Tensor]) -> Iterator[None]:
    """Let the blocks pass on what they get, so that patches stay apart; note what enters the first."""
    blocks = blocks_of(model, modality)

    def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        into.append(states.reshape(-1, states.shape[-1]))

    handle = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    for block in blocks:
        block.forward = same
    try:
        yield
    finally:
        handle.remove()
        for block in blocks:
            del block.forward


def marks(arguments: dict[str, Any], patch: int) -> Iterator[dict[str, Any]]:
    """Change the pixels of one patch after the other."""
    (name,) = (name for name in arguments if name.startswith("pixel_values"))
    pixels = arguments[name]
    if pixels.ndim == 2:
        places = [(row,) for row in range(len(pixels))]
    else:
        flat = pixels.flatten(0, -4)
        places = [
            (tile, slice(None), slice(row, row + patch), slice(col, col + patch))
            for tile in range(len(flat))
            # Empty tiles fill a batch up; marked, they would become real.
            if bool(flat[tile].any())
            for row in range(0, flat.shape[-2], patch)
            for col in range(0, flat.shape[-1], patch)
        ]
    for place in places:
        changed = pixels.clone()
        view = changed if pixels.ndim == 2 else changed.view(-1, *pixels.shape[-3:])
        view[place] += 3.0
        yield {**arguments, name: changed}


@cache
def encoder(batch: Batch, modality: str) -> Encoder:
    """Run the encoder on the media of a batch, and follow every patch to the visual tokens."""
    model = batch.family.model("eager")
    arguments = encoding_arguments(model, modality, cast(batch.inputs, torch.float32))
    found = Encoder()
    with recorded(model, modality, found):
        features(model, modality, arguments)
    found.tiles = [weights.shape[-1] for seen in found.calls[0] for weights in seen.weights]
    entered: list[Tensor] = []
    with unmixed(model, modality, entered):
        tokens = features(model, modality, arguments)
        before = entered[0]
        feeds: list[list[int]] = [[] for _ in tokens]
        marked: set[int] = set()
        vision = getattr(model.config, "vision_config", None)
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        for changed in marks(arguments, patch):
            entered.clear()
            after = features(model, modality, changed)
            rows = _changed(entered[0], before)
            # Pixels of padding reach no patch.
            assert len(rows) <= 1
            marked.update(rows)
            for token in _changed(after, tokens):
                feeds[token].extend(rows)
    found.feeds = feeds
    # What no pixel reaches is a class token.
    constant = set(range(len(before))) - marked
    found.cls = bool(constant)
    starts = {sum(found.tiles[:tile]) for tile in range(len(found.tiles))}
    assert constant == (starts if found.cls else set())
    tokens_in_all = sum(len(item.layout) for row in range(len(batch)) for item in layouts_of(batch.alone(row)))
    if modality == "video":
        # transformers 5.17 adds the newline of a video later.
        found.feeds += [[]] * (tokens_in_all - len(feeds))
    return found


def _changed(after: Tensor, before: Tensor) -> list[int]:
    return ((after - before).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
