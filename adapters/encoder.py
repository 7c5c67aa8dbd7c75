"""Run the vision encoder on fewer tokens: merge between its blocks, and give every patch its feature back behind it.

Nothing of the model is changed but for the length of one encoding call. What runs after the encoder, the
projector, the packing and the model's own checks, meets as many features as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from mmfast.adapters.alignment import is_plain
from mmfast.adapters.base import Adapter
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import Described
from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM, VisionSignal
from mmfast.token_pruning.encoder_base import EncoderMerger, EncoderTokens, merge_rows

GROUPS_SIGNAL = VisionSignal("groups")
_STAGE = "_mmfast_stage"
# Checkpointing wraps the call of a layer, hooks included, in some releases and only its forward in others.
CHECKPOINTS_RUN_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


class Shrunk:
    """What one encoding call did to the tokens of the encoder.

    Attributes:
        groups: ``[tiles, n]`` int64, the token of the encoder that each of its places shares, numbered over all
            tiles; class tokens first where they become visual tokens. None where nothing was shrunk.
        token_groups: the same per item and visual token, where it is known of those.
    """

    def __init__(self) -> None:
        self.groups: Tensor | None = None
        self.token_groups: list[Tensor] | None = None

    def expand(self, rows: Tensor, block: int) -> Tensor:
        """Give every place what is known of its token in a block.

        Args:
            rows: ``[tiles, n, C]`` as the block saw them, with or without the class token.
            block: the block.
        """
        return rows


def resolved(adapter: Adapter, method: BeforeLLM) -> BeforeLLM:
    """Decide where a method acts that leaves it to the model.

    Raises:
        ValueError: if it was told to act inside the encoder and the model does not allow it.
    """
    if not isinstance(method, EncoderMerger) or method.where == "output":
        return method
    reason = _obstacle(adapter)
    if reason and method.where == "encoder":
        raise ValueError(
            f"method {method.name!r}: where='encoder' is not possible on this model: {reason}; where='output' works"
        )
    return replace(method, where="output" if reason else "encoder")


def _obstacle(adapter: Adapter) -> str:
    """Say why tokens cannot be merged between the blocks of the vision encoder; empty where they can."""
    for modality in ("image", "video"):
        if not hasattr(adapter.base, f"get_{modality}_features"):
            continue
        if not adapter.merges_in_encoder:
            return "neighbouring patches are joined, or tiles are put together, behind the vision encoder"
        tower = adapter.tower(modality)
        if not is_plain(tower):
            return f"its vision encoder {type(tower).__name__} is no plain stack of blocks"
        if adapter.feature_block(modality, {}) == 0:
            return "it uses the features of the first block of its vision encoder"
        implementation = tower.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return (
                f"attention implementation {implementation!r} of its vision encoder cannot weigh tokens "
                "(load the model with attn_implementation='sdpa' or 'eager')"
            )
    return ""


def settled(adapter: Adapter, plan: Plan) -> Plan:
    """Decide in the plan what its methods leave to the model.

    Raises:
        ValueError: as :func:`resolved`.
    """
    methods = [resolved(adapter, method) if isinstance(method, BeforeLLM) else method for method in plan.methods]
    return Plan(tuple(methods))


class Shrinker(Protocol):
    """Runs the vision encoder on fewer tokens, for one modality."""

    def at_work(self, arguments: Mapping[str, Any]) -> AbstractContextManager[Shrunk]:
        """Do so as long as the context lasts.

        Args:
            arguments: arguments of ``get_{modality}_features`` by name.
        """


class Untouched:
    """Leave the encoder alone."""

    @contextmanager
    def at_work(self, arguments: Mapping[str, Any]) -> Iterator[Shrunk]:
        """Do nothing."""
        yield Shrunk()


def add_groups(
    adapter: Adapter,
    modality: str,
    arguments: Mapping[str, Any],
    features: Sequence[Tensor],
    shrunk: Shrunk,
    described: Described,
) -> None:
    """Note beside the layouts which visual tokens share a token of the encoder.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        arguments: arguments of the encoding call by name.
        features: what it returned, one ``[n, D]`` tensor per item.
        shrunk: what was done to the tokens.
        described: the layouts, with all else that was read.
    """
    parts = shrunk.token_groups
    if shrunk.groups is not None:
        # Whole numbers survive the average over the patches of a token, which all have the same.
        aligned = adapter.align(modality, arguments, shrunk.groups.double()[..., None], features)
        parts = [part[:, 0].round().long() for part in aligned]
    for place, part in enumerate(parts or []):
        described.signals[place][GROUPS_SIGNAL] = part


class EncoderMerging:
    """Merge between the blocks of the vision encoder for one modality.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        method: the method, which acts inside the encoder.
    """

    def __init__(self, adapter: Adapter, modality: str, method: EncoderMerger) -> None:
        self.adapter = adapter
        self.modality = modality
        self.method = method

    @contextmanager
    def at_work(self, arguments: Mapping[str, Any]) -> Iterator[Shrunk]:
        """Merge as long as the context lasts.

        Args:
            arguments: arguments of ``get_{modality}_features`` by name.
        """
        tower = self.adapter.tower(self.modality)
        if (
            tower.training
            and CHECKPOINTS_RUN_HOOKS
            and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
        ):
            raise ValueError(
                f"method {self.method.name!r}: merging inside the vision encoder with gradient checkpointing needs a "
                "newer transformers; turn checkpointing off, or use where='output'"
            )
        call, ledger = _Call(self, arguments), Ledger()
        try:
            call.hook(ledger)
            yield call
        finally:
            ledger.undo()


class _Call(Shrunk):
    """One run of the encoder."""

    def __init__(self, merging: EncoderMerging, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        adapter, modality = merging.adapter, merging.modality
        self.method = merging.method
        self.tower = adapter.tower(modality)
        self.blocks = adapter.vision_blocks(modality)
        self.feature_block = adapter.feature_block(modality, arguments)
        self.several = len(adapter.feature_layers(arguments)) > 1
        self.first = int(adapter.class_token(modality))
        self.class_stays = bool(self.first) and adapter.keeps_class_token(modality, arguments)
        self.frames = adapter.tiles_per_item(modality, arguments)
        self.grid = (0, 0)
        self.left: dict[int, int] = {}
        # Per stage, [B, places] int64: the token of that stage each place went into. Stage 0 is before all merging.
        self.sources: list[Tensor] = []
        self.stage_of: dict[int, int] = {}
        self.sizes = self.lengths = self.mask = self.keys = torch.empty(0)

    def hook(self, ledger: Ledger) -> None:
        """Enter the hooks."""
        ledger.hook(self.tower.register_forward_pre_hook(self._enter, with_kwargs=True))
        for index, block in enumerate(self.blocks):
            ledger.hook(block.register_forward_pre_hook(self._before(index), with_kwargs=True))
        for index in range(self.feature_block):
            block = self.blocks[index]
            ledger.hook(block.self_attn.k_proj.register_forward_hook(self._note_keys))  # type: ignore[union-attr]
            ledger.hook(block.register_forward_hook(self._after(index)))
        ledger.hook(self.tower.register_forward_hook(self._leave))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.grid = patch_grid(self.tower, pixels_of(args, kwargs))

    # ------------------------------------------------------------------ between the blocks

    def _before(self, index: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                self._begin(hidden)
            self.stage_of[index] = len(self.sources) - 1
            setattr(hidden, _STAGE, len(self.sources) - 1)
            if not self.mask.numel():
                return None
            mask = self.mask.expand(-1, -1, hidden.shape[1], -1)
            if len(args) > 1:
                return (args[0], mask, *args[2:]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        return before

    def _begin(self, hidden: Tensor) -> None:
        """Count: how many tokens there are, and how many shall be left."""
        rows, places = hidden.shape[:2]
        patches = places - self.first
        if self.grid[0] * self.grid[1] != patches:
            raise ValueError(
                f"method {self.method.name!r}: the vision encoder runs on {patches} patches, not on the "
                f"{self.grid[0]} x {self.grid[1]} of the pixels; where='output' works"
            )
        self.sources = [torch.arange(places, device=hidden.device).expand(rows, -1)]
        self.sizes = torch.ones(rows, places, device=hidden.device)
        self.lengths = torch.full((rows,), places)
        each = patches + self.class_stays
        kept = self.method.keep_count(self.frames * each)
        if kept < self.frames * each:
            wanted = max(1, math.ceil(kept / self.frames) - self.class_stays)
            self.left = dict(self.method.schedule(self.feature_block, patches, wanted))

    def _note_keys(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keys = output.detach()

    def _after(self, index: int) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            states: Tensor = output[0] if isinstance(output, tuple) else output
            setattr(states, _STAGE, len(self.sources) - 1)
            left = self.left.get(index)
            if left is None or left + self.first >= int(self.lengths.max()):
                return None
            merged = self._merge(states, left + self.first)
            setattr(merged, _STAGE, len(self.sources) - 1)
            return (merged, *output[1:]) if isinstance(output, tuple) else merged

        return after

    def _merge(self, states: Tensor, left: int) -> Tensor:
        heads = self.blocks[0].self_attn.num_heads  # type: ignore[union-attr]
        keys = self.keys.float().unflatten(-1, (heads, -1)).mean(dim=2)
        rows, sizes, sources = [], [], []
        for row, length in enumerate(self.lengths.tolist()):
            own, weight = states[row, :length], self.sizes[row, :length]
            tokens = EncoderTokens(own.detach(), keys[row, :length], weight, self.grid, bool(self.first))
            places, source = self.method.merge_block(tokens, left)
            merged, weight = merge_rows(own, weight, source, len(places))
            rows.append(merged)
            sizes.append(weight)
            sources.append(source[self.sources[-1][row]])
        self.lengths = torch.tensor([len(row) for row in rows])
        self.sizes = pad_sequence(sizes, batch_first=True)
        self.sources.append(torch.stack(sources))
        self.mask = self._new_mask(states.dtype)
        return pad_sequence(rows, batch_first=True)

    def _new_mask(self, dtype: torch.dtype) -> Tensor:
        """Return ``[B, 1, 1, n]`` to add to the attention logits; empty where there is nothing to add."""
        padding = self.sizes == 0
        if not self.method.weighs and not bool(padding.any()):
            return torch.empty(0)
        weight = self.sizes.clamp_min(1).log() if self.method.weighs else torch.zeros_like(self.sizes)
        return weight.to(dtype).masked_fill(padding, torch.finfo(dtype).min)[:, None, None]

    # ---------------------------------------------------------------------- behind the encoder

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give every place the feature of its token."""
        last = self.sources[-1]
        own = last if self.class_stays else last[:, self.first :]
        self.groups = own + torch.arange(len(own), device=own.device)[:, None] * last.shape[1]
        if len(self.sources) == 1:
            return
        output.last_hidden_state = self._expanded(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._expanded(states) for states in output.hidden_states)

    def _expanded(self, states: Tensor | None) -> Tensor | None:
        if states is None:
            return None
        stage = getattr(states, _STAGE, len(self.sources) - 1)
        found = gathered(states, self.sources[stage])
        if not self.several or stage == len(self.sources) - 1:
            return found
        # Features of several blocks are joined: each has to be that of the tokens there are in the end.
        last = self.sources[-1]
        ones = torch.ones(last.shape[1], device=states.device)
        rows = [
            merge_rows(row, ones, source, int(source.max()) + 1)[0] for row, source in zip(found, last, strict=True)
        ]
        return torch.stack([row[source] for row, source in zip(rows, last, strict=True)])

    def expand(self, rows: Tensor, block: int) -> Tensor:
        """As in the base."""
        source = self.sources[self.stage_of[block]]
        if rows.shape[1] == int(source.max()) + 1:
            return gathered(rows, source)
        # Signals that only patches have come without the class token.
        return gathered(rows, source[:, self.first :] - self.first)


def pixels_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the pixels ``[B, 3, H, W]`` an encoder is called with."""
    pixels: Tensor = args[0] if args else kwargs["pixel_values"]
    return pixels


def patch_size(tower: Any) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    size = tower.config.patch_size
    high, wide = (size, size) if isinstance(size, int) else size
    return int(high), int(wide)


def patch_grid(tower: Any, pixels: Tensor) -> tuple[int, int]:
    """Return rows and columns of patches."""
    high, wide = patch_size(tower)
    return pixels.shape[-2] // high, pixels.shape[-1] // wide


def gathered(states: Tensor, source: Tensor) -> Tensor:
    """Gather rows ``[B, n, C]`` by ``[B, places]``."""
    return states.gather(1, source.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
