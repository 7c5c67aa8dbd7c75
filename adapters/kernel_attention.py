"""Layers whose attention is answered by the library's own kernels, where these can run; masks are not written then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.attention import Attended, Listener, Operands, tap_name, watch, watchers
from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Block, Inner, Level
from mmfast.adapters.masks import hide
from mmfast.adapters.packed import PackedLayer
from mmfast.adapters.reading import switch_on_tap
from mmfast.kernels.checks import gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.gather_decode import gather_decode
from mmfast.kernels.masked_rect import masked_rect, rectangles_of
from mmfast.kernels.masked_rect.reference import visible_of
from mmfast.kernels.tree_attention import tree_attention

# ------------------------------------------------------------------------------ whether


def runs(operation: str, adapter: Adapter, states: Tensor, refusal: str = "", *, backward: bool = False) -> bool:
    """Say whether a kernel answers in this call; a reason why not is logged once.

    Args:
        operation: name of the kernel.
        adapter: the adapter of the model.
        states: what the kernel reads, or something of the same dtype in the same place.
        refusal: a reason of the caller's not to; empty = none.
        backward: the kernel has a backward form.

    Raises:
        RuntimeError: if Triton was asked for and cannot run.
    """
    refusal = refusal or refusal_of(states) or _refusal(adapter)
    if not backward:
        refusal = refusal or gradient_refusal(states)
    return chosen(operation, refusal) == "triton"


def _refusal(adapter: Adapter) -> str:
    """Say what about a model keeps kernels from standing in for its attention; empty where nothing does."""
    config, decoder = adapter.text_config, adapter.decoder
    implementation = config._attn_implementation.removeprefix(tap_name(""))
    if implementation not in ("sdpa", "eager") and "flash" not in implementation:
        return f"attention implementation {implementation!r} may be more than attention"
    if getattr(adapter.attention(adapter.layers[0]), "sinks", None) is not None:
        return "the model attends to sinks of its own"
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return "gradient checkpointing runs layers again after the call"
    if decoder.training and getattr(config, "attention_dropout", 0):
        return "attention drops entries out"
    return ""


def answer(adapter: Adapter, inner: Inner, index: int, listener: Listener) -> None:
    """Let a listener attend for a layer for the length of a call; it knows by itself who sees what."""
    switch_on_tap(adapter, inner)
    inner.undo.append(watch(adapter.attention(adapter.layers[index]), listener))
    inner.tables["answered", index] = True


def answered(inner: Inner, index: int) -> bool:
    """Say whether a kernel attends for a layer, which needs no mask then."""
    return ("answered", index) in inner.tables


# ------------------------------------------------------------------------------ decoding


def arm_step(adapter: Adapter, inner: Inner, index: int) -> None:
    """Let a kernel attend from one new token, where the layer is packed or its heads differ."""
    cached = inner.cache.layers[index]
    if isinstance(cached, PackedLayer):
        # Blocks are looked at, and joined, only where something can read them.
        able = runs("quant_decode", adapter, cached.loose)
        if able and runs("quant_decode", adapter, cached.loose, cached.unreadable()):
            cached.waits = True
            inner.undo.append(cached.stop_waiting)
            answer(adapter, inner, index, _Packed(cached))
    elif (cached.heads is not None or cached.bias is not None) and runs("gather_decode", adapter, cached.keys):
        answer(adapter, inner, index, _Marked(cached))


def arm_block(adapter: Adapter, inner: Inner, block: Block, index: int) -> None:
    """Let a kernel attend from drafted tokens, where they are a tree or heads of the layer differ."""
    cached = inner.cache.layers[index]
    plain = block.sees is None and cached.heads is None and cached.bias is None
    if plain or cached.is_sliding:
        return
    states = cached.loose if isinstance(cached, PackedLayer) else cached.keys
    if runs("tree_attention", adapter, states):
        answer(adapter, inner, index, _Tree(cached, block))


def attend_marked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: Mapping[str, Any],
    *,
    kept: Tensor,
    bias: Tensor | None,
) -> Attended:
    """Attend from one token of each row to some entries.

    Args:
        query: ``[B, H, 1, d]``.
        key: ``[B, G, P, d]``.
        value: ``[B, G, P, d]``.
        mask: as the attention function got it.
        options: its keywords.
        kept: bool ``[B, S, P]``, what each group of query heads reads; S divides H.
        bias: float ``[B, S, P]``, added to the logits; None = nothing.
    """
    seen, bias = _masked(mask, kept, bias, (key.shape[0], key.shape[2]))
    output, _ = gather_decode(
        query, key, value, kept=seen, bias=bias, scaling=options.get("scaling"), softcap=options.get("softcap")
    )
    return Attended(output)


@dataclass(frozen=True, eq=False)
class _Marked:
    """One new token, and heads that store different entries or weigh them."""

    cached: Any

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Attended:
        kept = self.cached.real_entries()
        return attend_marked(query, key, value, mask, options, kept=kept, bias=self.cached.bias)


@dataclass(frozen=True, eq=False)
class _Packed:
    """One new token, and entries as codes."""

    cached: PackedLayer

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Attended:
        seen, bias = _masked(mask, self.cached.heads, self.cached.bias, (query.shape[0], self.cached.stored))
        return Attended(self.cached.attend(query, seen, bias, options.get("scaling"), options.get("softcap")))


@dataclass(frozen=True, eq=False)
class _Tree:
    """Drafted tokens, each of which sees those on its path."""

    cached: Any
    block: Block

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> Attended:
        stored = key.shape[2] - query.shape[2]
        valid = self.cached.valid if self.cached.heads is None else self.cached.heads
        output, _ = tree_attention(
            query,
            key,
            value,
            self.block.visible(),
            valid=None if valid is None else valid[..., :stored],
            bias=None if self.cached.bias is None else self.cached.bias[..., :stored],
            scaling=options.get("scaling"),
            softcap=options.get("softcap"),
        )
        return Attended(output)


def _masked(
    mask: Tensor | None, kept: Tensor | None, bias: Tensor | None, sizes: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Add what a mask of one query says to marks and weights of entries.

    Args:
        mask: as the attention function got it; its last columns are the stored entries.
        kept: bool ``[B, S, P]``.
        bias: float ``[B, S, P]``.
        sizes: B and P.
    """
    if mask is None:
        return kept, bias
    batch, stored = sizes
    own = mask[:, None].bool() if mask.ndim == 2 else mask[:, :, -1]
    own = own[..., -stored:].expand(batch, -1, -1)
    if own.dtype == torch.bool:
        return own if kept is None else torch.logical_and(*_alike(own, kept)), bias
    return kept, own.float() if bias is None else torch.add(*_alike(own.float(), bias))


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Write two books ``[B, S, P]`` out for as many groups of heads as the finer of them has."""
    heads = max(first.shape[1], second.shape[1])
    first, second = (book.repeat_interleave(heads // book.shape[1], dim=1) for book in (first, second))
    return first, second


# ------------------------------------------------------------------------------ prompts


Pairs = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""Per row of the batch, rows and columns that see each other: int64 places among the tokens of the call."""


def arm_pairs(adapter: Adapter, inner: Inner, embeds: Tensor, pairs: Callable[[Inner], Pairs]) -> bool:
    """Let a kernel attend in all layers of a prompt in which more tokens see each other than causality allows.

    It does so from :func:`arm_waiting` on.

    Args:
        adapter: the adapter of the model.
        inner: the call, with its first level.
        embeds: ``[B, S, D]`` for device and dtype.
        pairs: gives what becomes visible; asked for where a kernel runs only.

    Returns:
        Whether it does; else a mask has to say so.
    """
    layers = [None] * adapter.shape.layers if inner.cache is None else list(inner.cache.layers)
    if not _in_rectangles(adapter, embeds, layers):
        return False
    found = pairs(inner)
    modules = [adapter.attention(layer) for layer in adapter.layers]
    written: dict[tuple[Any, ...], Tensor] = {}
    inner.tables["waiting"] = [
        _Rectangles(module, inner.levels[0], cached, found, written=written)
        for module, cached in zip(modules, layers, strict=True)
    ]
    return True


def arm_waiting(adapter: Adapter, inner: Inner) -> None:
    """Arm what was decided on before the call could be undone."""
    for index, listener in enumerate(inner.tables.pop("waiting", ())):
        answer(adapter, inner, index, listener)


def arm_shown(adapter: Adapter, inner: Inner, index: int, level: Level, step: Tensor, states: Tensor) -> bool:
    """Let a kernel attend in one layer, all of whose tokens are seen while only some attend.

    Args:
        adapter: the adapter of the model.
        inner: the call.
        index: of the layer.
        level: the tokens that are seen.
        step: ``[B, q]`` int64 places of those that attend among them.
        states: input of the layer, for device and dtype.

    Returns:
        Whether it does; else a mask has to say so.
    """
    cached = None if inner.cache is None else inner.cache.layers[index]
    if not _in_rectangles(adapter, states, [cached]):
        return False
    module = adapter.attention(adapter.layers[index])
    answer(adapter, inner, index, _Rectangles(module, level, cached, [], step))
    return True


def _in_rectangles(adapter: Adapter, states: Tensor, layers: Sequence[Any]) -> bool:
    """Say whether what tokens of a prompt see in these layers can be told in rectangles, and a kernel runs."""
    # What a family puts into its own masks is not known.
    if adapter.masks_before_decoder or adapter.slides:
        return False
    if any(cached is not None and (cached.heads is not None or cached.bias is not None) for cached in layers):
        return False
    return runs("masked_rect", adapter, states, backward=True)


@dataclass(frozen=True, eq=False)
class _Rectangles:
    """Tokens of a prompt of which some see more, or fewer attend, than causality says.

    Attributes:
        module: the attention module.
        level: the tokens that are seen.
        cached: the cache layer; None without a cache.
        pairs: what is visible against causality; may be empty.
        step: ``[B, q]`` int64 places of those that attend among the tokens that are seen; None = all.
        written: rectangles by sizes and device; layers that see the same share them.
    """

    module: nn.Module
    level: Level
    cached: Any
    pairs: Pairs
    step: Tensor | None = None
    written: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def take(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Operands | Attended:
        """Attend; where others read what the module attends with, write a mask out for all."""
        batch, _, queries, _ = query.shape
        columns, device = key.shape[2], query.device
        before = columns - self.level.length
        rectangles = self._rectangles(queries, columns, before, device).expand(batch, -1, -1)
        step = torch.arange(queries, device=device).expand(batch, -1) if self.step is None else self.step.to(device)
        valid = self.level.real if self.cached is None else self.cached.valid
        valid = None if valid is None else valid.to(device)
        if watchers(self.module) > 1:
            visible = visible_of(rectangles, before + step, valid, columns, slice(None))
            return key, value, hide(query.new_zeros(visible.shape), ~visible)[:, None]
        limits = {"scaling": options.get("scaling"), "softcap": options.get("softcap")}
        return Attended(masked_rect(query, key, value, rectangles, places=before + step, valid=valid, **limits)[0])

    def _rectangles(self, queries: int, columns: int, before: int, device: torch.device) -> Tensor:
        """Return int32 ``[B or 1, M, 5]``; prompts with fewer rectangles are filled up with empty ones."""
        key = (queries, columns, before, device)
        if key not in self.written:
            self.written[key] = self._write(*key)
        return self.written[key]

    def _write(self, queries: int, columns: int, before: int, device: torch.device) -> Tensor:
        causal = [(0, queries, 0, columns)]
        shifted = [[(rows, before + others) for rows, others in pairs] for pairs in self.pairs] or [[]]
        each = [rectangles_of(pairs, causal, device=device) for pairs in shifted]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
