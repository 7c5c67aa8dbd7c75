"""One prompt in the cache, many continuations of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmfast.adapters.attention import Attended, register_answered, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import reference_layer
from mmfast.adapters.ledger import Ledger
from mmfast.kernels.rerotate import rerotate
from mmfast.kernels.shared_prefix import shared_prefix
from mmfast.kv.cache import LogicalLength

_BOOKS = ("slots", "heads", "bias", "positions")


@dataclass(frozen=True)
class PrefixLayer:
    """What one layer stored of the prompt.

    Attributes:
        keys: ``[G, P, d]``.
        values: ``[G, P, d]``.
        slots: ``[P]`` int64, place of each entry in the prompt.
        heads: bool ``[G, P]``, entries that exist in each head; None = all.
        bias: float32 ``[G, P]``, added to the logits; None = nothing.
        window: sliding window in places, or None.
        positions: ``[P]`` int64, the position id each key was rotated to; -1 where it has several dimensions that
            differ, None = not known.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    heads: Tensor | None = None
    bias: Tensor | None = None
    window: int | None = None
    positions: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        named = {"keys": self.keys, "values": self.values, **{name: getattr(self, name) for name in _BOOKS}}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass
class _Call:
    """Who sees what of the suffix in one call.

    Attributes:
        visible: bool ``[B, q, s]``.
        places: ``[B, s]`` int64, place of each suffix token counted from the start of the prompt, for windows.
    """

    visible: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class _Continued:
    """Attention of one layer to the prompt and to what follows it."""

    prefix: PrefixLayer
    call: _Call

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Attended:
        prefix, call = self.prefix, self.call
        visible, own = prefix.heads, call.visible
        if prefix.window is not None:
            edge = call.places[:, -query.shape[2] :, None] - prefix.window
            visible = prefix.slots.to(query.device) > edge
            own = own & (call.places[:, None, :] > edge)
        output, _ = shared_prefix(
            query,
            (prefix.keys, prefix.values),
            (key, value),
            own,
            prefix_visible=visible,
            prefix_bias=prefix.bias,
            scaling=options.get("scaling"),
            softcap=options.get("softcap"),
        )
        return Attended(output)


class _SuffixLayer(DynamicLayer):  # type: ignore[misc]
    """What follows the prompt, counted on from its end."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def get_seq_length(self) -> int:
        return self.before + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class SharedPrefix:
    """The cache of one prompt, and how to go on from it.

    Args:
        adapter: the adapter of the model.
        layers: what each layer stored.
        seen: tokens of the prompt as the user passed them.
        start: position of the next token.
    """

    def __init__(self, adapter: Adapter, layers: Sequence[PrefixLayer], seen: int, start: int) -> None:
        self.adapter, self.layers, self.seen, self.start = adapter, list(layers), seen, start

    @torch.no_grad()
    def generate(self, questions: Sequence[Sequence[int]], steps: int, ends: Sequence[int]) -> list[list[int]]:
        """Answer greedily, all questions in one batch."""
        model = self.adapter.model
        device = next(model.parameters()).device
        longest = max(map(len, questions))
        ids = torch.zeros(len(questions), longest, dtype=torch.int64, device=device)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, question in enumerate(questions):
            ids[row, longest - len(question) :] = torch.tensor(list(question), device=device)
            real[row, longest - len(question) :] = True
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [_SuffixLayer(self.seen) for _ in self.layers]
        answers: list[list[int]] = [[] for _ in questions]
        alive = torch.ones(len(questions), dtype=torch.bool, device=device)
        call = _Call(torch.empty(0), torch.empty(0))
        with self._at_work(call):
            for _ in range(steps):
                logits = self._forward(ids, real, cache, call)
                chosen = logits.argmax(dim=-1)
                for row in alive.nonzero().squeeze(-1).tolist():
                    answers[row].append(int(chosen[row]))
                if ends:
                    alive &= ~torch.isin(chosen, torch.tensor(list(ends), device=device))
                if not bool(alive.any()):
                    break
                ids = chosen[:, None]
                real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        return answers

    def _forward(self, ids: Tensor, real: Tensor, cache: Any, call: _Call) -> Tensor:
        """Read tokens ``[B, q]``, the last q of the suffix ``real`` ``[B, s]``, and return the last logits."""
        query = ids.shape[1]
        order = (real.long().cumsum(dim=1) - 1).clamp_min(0)
        columns = torch.arange(real.shape[1], device=ids.device)
        causal = columns <= columns[-query:, None]
        # Padding sees itself, so that its softmax is defined; nobody looks at it.
        call.visible = (causal & real[:, None, :]) | (columns == columns[-query:, None])
        call.places = self.seen + order
        positions = self.start + order[:, -query:]
        wide = self.adapter.text_positions(torch.zeros(1, dtype=torch.int64)).ndim == 3
        output = self.adapter.model(
            input_ids=ids,
            position_ids=positions.expand(3, -1, -1) if wide else positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    @contextmanager
    def _at_work(self, call: _Call) -> Iterator[None]:
        config = self.adapter.text_config
        before, ledger = config._attn_implementation_internal, Ledger()
        try:
            name = register_answered(ledger)
            for layer, prefix in zip(self.adapter.layers, self.layers, strict=True):
                ledger.enter(watch(self.adapter.attention(layer), _Continued(prefix, call)))
            ledger.enter(lambda: setattr(config, "_attn_implementation_internal", before))
            config._attn_implementation_internal = name
            yield
        finally:
            ledger.undo()


# ------------------------------------------------------------------------- making one


class Contexts:
    """Make, rebuild and name shared contexts of one model.

    Args:
        adapter: the adapter of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def read(self, inputs: Mapping[str, Any]) -> SharedPrefix:
        """Read one prompt, with whatever plan is at work, and take its cache to go on from."""
        return _read(self.adapter, inputs)

    def rebuild(
        self, tensors: Mapping[str, Tensor], seen: int, start: int, windows: Sequence[int | None]
    ) -> SharedPrefix:
        """Build what :meth:`read` gave from its tensors, named ``<layer>.<what>``, on the device of the model."""
        device = next(self.adapter.model.parameters()).device
        layers = []
        for index, window in enumerate(windows):
            mark = f"{index}."
            own = {name.removeprefix(mark): one.to(device) for name, one in tensors.items() if name.startswith(mark)}
            layers.append(PrefixLayer(**own, window=window))
        return SharedPrefix(self.adapter, layers, seen, start)

    def joined(self, prefixes: Sequence[SharedPrefix]) -> SharedPrefix:
        """Put prefixes one after the other, as if they had been read at consecutive positions.

        Raises:
            ValueError: if keys of one of them cannot be turned to other positions.
        """
        layers = [
            _joined_layer(self.adapter, index, [prefix.layers[index] for prefix in prefixes])
            for index in range(self.adapter.shape.layers)
        ]
        end = int(layers[0].slots[-1]) + 1
        return SharedPrefix(self.adapter, layers, end, end)

    def fingerprint(self, inputs: Mapping[str, Any] | None = None, plan: str = "") -> str:
        """Name the model, and the inputs (bytes, shapes, dtypes) and the plan if given, by a hash.

        Of each weight the first and last values count.
        """
        return _fingerprint(self.adapter.model, inputs, plan)


@torch.no_grad()
def _joined_layer(adapter: Adapter, index: int, parts: Sequence[PrefixLayer]) -> PrefixLayer:
    """Turn the keys of several prefixes to consecutive positions."""
    turned: list[Tensor] = []
    for part in parts:
        known = part.positions
        if known is None or bool((known < 0).any()) or part.heads is not None or part.bias is not None:
            raise ValueError(
                "contexts can be joined only where each entry has one position of its own and all heads store the "
                "same: read them under a plan that leaves compression tokens alone, such as 'voco()', or 'full' for "
                "models whose images have one-dimensional positions"
            )
        turned.append(known)
    # What stands at 0 in every prompt is hidden behind compression tokens; where it is not, it goes first.
    begin = min(1, int(turned[0].min()))
    count = sum(len(known) for known in turned)
    places = torch.arange(begin, begin + count, device=parts[0].keys.device)
    layer = adapter.layers[index]
    keys = []
    for part, known, own in zip(parts, turned, places.split([len(known) for known in turned]), strict=True):
        old, new = (_tables(adapter, layer, part.keys, where) for where in (known, own))
        keys.append(rerotate(part.keys[None], old, new)[0])
    values = torch.cat([part.values for part in parts], dim=1)
    return PrefixLayer(torch.cat(keys, dim=1), values, places, positions=places, window=parts[0].window)


def _tables(adapter: Adapter, layer: nn.Module, keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[n, r]`` of text at some positions."""
    cos, sin = adapter.rotary(layer, keys, adapter.text_positions(places))
    # Where positions have several dimensions, those of text are alike.
    return cos.flatten(0, -3)[0], sin.flatten(0, -3)[0]


@torch.no_grad()
def _read(adapter: Adapter, inputs: Mapping[str, Any]) -> SharedPrefix:
    """Read a prompt, with whatever plan is at work on the model, and take its cache.

    Raises:
        ValueError: if there is more than one prompt, it is padded, or the plan needs to be at work later too.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ValueError(f"inputs hold {ids.shape[0]} prompts; a shared context has one, and questions come later")
    refuse_padding(inputs)
    positions: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("position_ids")
        positions.append(torch.arange(ids.shape[1], device=ids.device)[None] if given is None else given)

    handle = adapter.decoder.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        cache = adapter.model(
            **inputs,
            past_key_values=transformers.DynamicCache(config=adapter.text_config),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
    finally:
        handle.remove()
    shifts = {_shift(layer) for layer in cache.layers}
    if len(shifts) > 1:
        raise ValueError(
            "layers of this plan number positions differently, so that nothing can be shared; use positions='keep'"
        )
    (shift,) = shifts
    layers = [prefix_of(layer) for layer in cache.layers]
    if shift == 0:
        layers = [_with_positions(layer, positions[-1]) for layer in layers]
    return SharedPrefix(adapter, layers, reference_layer(cache).get_seq_length(), int(positions[-1].max()) + 1 - shift)


def refuse_padding(inputs: Mapping[str, Any]) -> None:
    """Refuse a padded prompt: what goes on from its cache sees every token of it.

    Raises:
        ValueError: saying how much of it is padding.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise ValueError(
            f"attention_mask calls {int((mask == 0).sum())} of {mask.shape[1]} tokens padding, which would be read "
            "like the others; pass the prompt without padding"
        )


def _with_positions(layer: PrefixLayer, given: Tensor) -> PrefixLayer:
    """Note the position of each entry, given the position ids ``[.., 1, S]`` of the prompt."""
    if layer.heads is not None:
        return layer
    # A fourth row in front counts tokens.
    own = given.reshape(-1, given.shape[-1])[-3:].to(layer.slots.device)
    alike = (own == own[:1]).all(dim=0)
    return replace(layer, positions=torch.where(alike, own[0], -1)[layer.slots])


def _shift(layer: Any) -> int:
    shift = getattr(layer, "shift", None)
    return 0 if shift is None else int(shift[0])


def prefix_of(layer: Any) -> PrefixLayer:
    """Take what one cache layer of one prompt holds."""
    window = layer.sliding_window if layer.is_sliding else None
    keys, values = layer.keys[0], layer.values[0]
    if not isinstance(layer, LogicalLength) or layer.slots is None:
        seen = layer.get_seq_length()
        return PrefixLayer(keys, values, torch.arange(seen - keys.shape[1], seen, device=keys.device), window=window)
    real = layer.real_entries()[0]
    bias = None if layer.bias is None else layer.bias[0]
    return PrefixLayer(keys, values, layer.slots[0], None if bool(real.all()) else real, bias, window)


def _fingerprint(model: nn.Module, inputs: Mapping[str, Any] | None, plan: str) -> str:
    digest = hashlib.sha256()
    config: Any = model.config
    stable = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    stable.pop("transformers_version", None)
    digest.update(json.dumps([plan, stable], sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(torch.cat([flat[:16], flat[-16:]]).float().cpu().numpy().tobytes())
    for name, value in sorted((inputs or {}).items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
