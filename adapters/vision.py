"""Read the vision encoder while the model encodes: attention, keys and features, aligned with the visual tokens.

Nothing of the model is changed but for the length of one encoding call: the blocks asked for are looked
at through the attention tap and through forward hooks, whatever attention they run with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mmfast.adapters.attention import register_tap, tap_name, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import Described
from mmfast.adapters.vision_attention import VisionAttention, joined_heads
from mmfast.token_pruning.base import Method, VisionSignal, check_choice
from mmfast.tokens import Layout

_OUTPUTS = ("patch_features", "cls_features")
_FROM_CLASS = ("cls_attention", "cls_logits")
_ATTENTION = (*_FROM_CLASS, "received_attention")


def check_signals(adapter: Adapter, method: Method) -> None:
    """Refuse signals of the vision encoder that the model cannot give.

    Raises:
        ValueError: naming the method, the signal and the reason.
    """
    wanted = method.vision_signals()
    for modality in ("image", "video"):
        if not wanted or not hasattr(adapter.base, f"get_{modality}_features"):
            continue
        tower = adapter.tower(modality)
        for name, spec in wanted.items():
            if spec.kind == "groups":
                continue
            prefix = f"method {method.name!r}, signal {name!r}:"
            if spec.kind == "cls_features" and method.stage != "before_llm":
                raise ValueError(f"{prefix} features of the class token are for methods before the LLM only")
            if spec.kind == "cls_features" and not adapter.class_token(modality):
                raise ValueError(
                    f"{prefix} the vision encoder {type(tower).__name__} has no class token; use a method or an option "
                    "that does not read its features"
                )
            try:
                check_choice("kind", spec.kind, [*_ATTENTION, "keys", "queries", *_OUTPUTS])
                check_choice("heads", spec.heads, ["mean", "sum", "join"])
                block = block_of(adapter, modality, spec, {})
            except ValueError as error:
                raise ValueError(f"{prefix} {error}") from None
            if spec.kind not in _OUTPUTS:
                _check_attention(adapter, modality, block, prefix)


def _check_attention(adapter: Adapter, modality: str, block: int, prefix: str) -> None:
    implementations = {config._attn_implementation for config in _configs(adapter.vision_blocks(modality)[block])}
    for implementation in implementations:
        if ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is None or implementation == "flex_attention":
            raise ValueError(
                f"{prefix} cannot be read of a vision encoder that runs attention implementation {implementation!r}; "
                "load the model with attn_implementation='sdpa', 'eager' or a flash implementation"
            )


def block_of(adapter: Adapter, modality: str, spec: VisionSignal, arguments: Mapping[str, Any]) -> int:
    """Say which block serves a signal.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        spec: the signal.
        arguments: arguments of the encoding call, which may name another layer for the features.

    Raises:
        ValueError: if the encoder has no such block.
    """
    depth, layer = len(adapter.vision_blocks(modality)), spec.layer
    if layer == "features":
        block = adapter.feature_block(modality, arguments)
    elif layer == "last":
        block = depth - 1
    elif isinstance(layer, float) and 0.0 < layer < 1.0:
        block = min(depth - 1, round(layer * depth))
    elif isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < depth:
        block = layer
    else:
        raise ValueError(
            f"layer={layer!r} must be 'features', 'last', an index in 0..{depth - 1} (the vision encoder has {depth} "
            "blocks) or a relative depth, a float in (0, 1)"
        )
    return adapter.attention_block(modality, block) if spec.kind in _ATTENTION else block


@dataclass
class Reading:
    """What was read in one encoding call.

    Attributes:
        blocks: signal -> the block that serves it.
        pieces: signal -> ``[tiles, rows, C]``, one tensor per attention call; rows of the class token, where
            the signal has one, come first.
        expand: gives every patch what its token has, where the encoder ran on fewer tokens.
    """

    blocks: dict[VisionSignal, int] = field(default_factory=dict)
    pieces: dict[VisionSignal, list[Tensor]] = field(default_factory=dict)
    expand: Callable[[Tensor, int], Tensor] | None = None

    def rows(self, spec: VisionSignal) -> Tensor:
        """Join the pieces of one signal, which are images or frames inside one packed sequence.

        Raises:
            ValueError: if nothing was read.
        """
        found = self.pieces[spec]
        if not found:
            raise ValueError(
                f"the vision encoder did not show {spec.kind!r} of block {self.blocks[spec]}: it does not attend "
                "through the attention interface of transformers; use a method that needs no such signal"
            )
        rows = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return rows if self.expand is None else self.expand(rows, self.blocks[spec])


class VisionReader:
    """Read what some methods declared, for one modality.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        methods: the methods of the plan.
        more: what else to read.
    """

    def __init__(
        self, adapter: Adapter, modality: str, methods: Sequence[Method], more: Sequence[VisionSignal] = ()
    ) -> None:
        self.adapter = adapter
        self.modality = modality
        wanted = [spec for method in methods for spec in method.vision_signals().values() if spec.kind != "groups"]
        self.specs = tuple(dict.fromkeys([*wanted, *more]))
        # A function and no method: what is kept beside the features may be copied, the model must not be.
        self._project = _projection(adapter)

    @cached_property
    def _class_token(self) -> bool:
        return self.adapter.class_token(self.modality)

    # ------------------------------------------------------------------ reading

    @contextmanager
    def reading(self, arguments: Mapping[str, Any]) -> Iterator[Reading]:
        """Look at the encoder as long as the context lasts.

        Args:
            arguments: arguments of ``get_{modality}_features`` by name.
        """
        reading, ledger = Reading(), Ledger()
        try:
            if self.specs:
                self._look(reading, arguments, ledger)
            yield reading
        finally:
            ledger.undo()

    def _look(self, reading: Reading, arguments: Mapping[str, Any], ledger: Ledger) -> None:
        blocks = self.adapter.vision_blocks(self.modality)
        lengths = self.adapter.sequences(self.modality, arguments)
        attended: dict[int, list[VisionSignal]] = {}
        for spec in self.specs:
            block = reading.blocks[spec] = block_of(self.adapter, self.modality, spec, arguments)
            reading.pieces[spec] = []
            if spec.kind in _OUTPUTS:
                ledger.hook(blocks[block].register_forward_hook(_note_output(reading.pieces[spec])))
            else:
                attended.setdefault(block, []).append(spec)
        for block, specs in attended.items():
            listener = _Listener(tuple(specs), reading, self._class_token, lengths)
            for module in blocks[block].modules():
                # Whichever of them attends: families differ in its name.
                ledger.enter(watch(module, listener))
            for config in _configs(blocks[block]):
                implementation = config._attn_implementation
                if not implementation.startswith(tap_name("")):
                    register_tap(implementation, ledger)
                    ledger.set_attribute(config, "_attn_implementation_internal", tap_name(implementation))

    # ----------------------------------------------------------------- aligning

    def describe(
        self, reading: Reading, arguments: Mapping[str, Any], features: Sequence[Tensor], layouts: Sequence[Layout]
    ) -> Described:
        """Align what was read with the visual tokens.

        Args:
            reading: what was read.
            arguments: arguments of the encoding call by name.
            features: what it returned, one ``[n, D]`` tensor per item.
            layouts: where the tokens of each image or video lie.

        Raises:
            ValueError: if patches and tokens cannot be brought together.
        """
        described = Described(layouts)
        keeps = self._class_token and self.adapter.keeps_class_token(self.modality, arguments)
        for spec in self.specs:
            rows = reading.rows(spec)
            if spec.kind == "cls_features":
                parts = self._per_tile(rows, arguments, features, layouts, keeps)
            else:
                parts = self._align(_with_class(rows, spec, self._class_token, keeps), arguments, features, layouts)
            if spec.kind in _ATTENTION:
                parts = [part.squeeze(-1) for part in parts]
            projectable = self._projectable(spec, rows, reading.blocks[spec], arguments, features, layouts, keeps)
            for place, part in enumerate(parts):
                described.signals[place][spec] = part
                if projectable[place]:
                    described.projections[place][spec] = self._project
        return described

    def _align(
        self, maps: Tensor, arguments: Mapping[str, Any], features: Sequence[Tensor], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        parts = self.adapter.align(self.modality, arguments, maps, features)
        sizes, wanted = [len(part) for part in parts], [len(layout) for layout in layouts]
        if sizes != wanted:
            raise ValueError(
                f"what the vision encoder says of {sizes} tokens cannot be aligned with the {wanted} visual tokens of "
                f"this {self.modality} input; use a method that needs no signals of the vision encoder"
            )
        return parts

    def _per_tile(
        self,
        rows: Tensor,
        arguments: Mapping[str, Any],
        features: Sequence[Tensor],
        layouts: Sequence[Layout],
        keeps: bool,
    ) -> list[Tensor]:
        """Hand out the class tokens; each tile's number goes the way of its patches."""
        number = torch.arange(1.0, len(rows) + 1, device=rows.device)[:, None, None]
        number = number.expand(-1, rows.shape[1] - (not keeps), 1)
        found = []
        for part in self._align(number, arguments, features, layouts):
            # Newline tokens carry 0, and between two tiles a shrunk token may carry a fraction.
            whole = part[(part >= 1) & (part == part.round())]
            found.append(rows[whole.long().unique() - 1, 0])
        return found

    def _projectable(
        self,
        spec: VisionSignal,
        rows: Tensor,
        block: int,
        arguments: Mapping[str, Any],
        features: Sequence[Tensor],
        layouts: Sequence[Layout],
        keeps: bool,
    ) -> list[bool]:
        """Say per item whether the projector turns the rows of this signal into the embeddings, one by one."""
        never = [False] * len(layouts)
        if spec.kind != "patch_features" or block != self.adapter.feature_block(self.modality, arguments):
            return never
        if not self.adapter.projectable(self.modality, arguments):
            return never
        if self.adapter.pools_before_projecting(self.modality):
            return [True] * len(layouts)
        # Where tokens are mixtures of patches, the mean of squares differs from the square of the mean.
        count = rows.shape[1] - (self._class_token and not keeps)
        probe = (torch.arange(count, device=rows.device) % 251).float().expand(len(rows), -1)
        probe = torch.stack([probe, probe.square()], dim=-1)
        parts = self._align(probe, arguments, features, layouts)
        return [bool((part[:, 0].square() - part[:, 1]).abs().max() < 0.01) for part in parts]


class _Listener:
    """Reduce queries and keys to what was asked for, as soon as the encoder attends."""

    def __init__(
        self, specs: tuple[VisionSignal, ...], reading: Reading, class_token: bool, lengths: Sequence[int] | None
    ) -> None:
        self.specs = specs
        self.reading = reading
        self.class_token = class_token
        self.lengths = lengths

    @torch.no_grad()
    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
        """Read one call of the attention function."""
        for attended in VisionAttention(query.detach(), key.detach(), mask, options.get("scaling")).split(
            self._lengths(query, options)
        ):
            # Without a class token several signals are one and the same costly reading.
            read: dict[tuple[str, str], Tensor] = {}
            for spec in self.specs:
                kind = spec.kind if self.class_token or spec.kind not in _FROM_CLASS else "received_attention"
                if (kind, spec.heads) not in read:
                    read[kind, spec.heads] = self._read(kind, spec.heads, attended)
                self.reading.pieces[spec].append(read[kind, spec.heads])

    def _lengths(self, query: Tensor, options: Mapping[str, Any]) -> list[int]:
        """Say which images or frames share one packed sequence without seeing each other."""
        packed = options.get("cu_seq_lens_q")
        if packed is not None:
            return [int(length) for length in packed.diff().tolist()]
        if self.lengths is not None and query.shape[0] == 1 and sum(self.lengths) == query.shape[2]:
            return list(self.lengths)
        return [query.shape[2]]

    def _read(self, kind: str, heads: str, attended: VisionAttention) -> Tensor:
        if kind in ("keys", "queries"):
            return joined_heads((attended.key if kind == "keys" else attended.query).float(), heads)
        own = attended.as_one_head() if heads == "join" else attended
        if kind in _FROM_CLASS:
            found = own.first_row(softmax=kind == "cls_attention")
            found = found.sum(dim=1) if heads == "sum" else found.mean(dim=1)
        else:
            found = own.received(average=heads != "sum")
        return (found[:, 1:] if self.class_token else found)[..., None]


def _with_class(rows: Tensor, spec: VisionSignal, class_token: bool, keeps: bool) -> Tensor:
    """Give the maps a row for the class token exactly where it is a visual token."""
    if spec.kind in _ATTENTION:
        # It has no attention of its own kind: the mean of its tile neither favours nor dooms it.
        return torch.cat([rows.mean(dim=1, keepdim=True), rows], dim=1) if keeps else rows
    return rows[:, 1:] if class_token and not keeps else rows


def _note_output(pieces: list[Tensor]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        pieces.append(states[None] if states.ndim == 2 else states)

    return note


def _configs(block: nn.Module) -> list[Any]:
    """Return the configurations that the modules of a block hold; usually it is one."""
    found = {id(module.config): module.config for module in block.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _projection(adapter: Adapter) -> Callable[[Tensor], Tensor]:
    return lambda features: adapter.project(features)
