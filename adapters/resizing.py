"""Show the vision encoder smaller pictures, and spread its fewer features over the places of the full ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmfast.adapters.base import Adapter
from mmfast.adapters.encoder import (
    EncoderMerging,
    Shrinker,
    Shrunk,
    Untouched,
    gathered,
    patch_grid,
    patch_size,
    pixels_of,
)
from mmfast.adapters.ledger import Ledger
from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM
from mmfast.token_pruning.before_llm.downsample import Downsample, smaller_grid
from mmfast.token_pruning.encoder_base import EncoderMerger

# What callers may have worked out for the full grids; the encoder works it out anew for the smaller ones.
_OF_GRIDS = (
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
    "window_index",
    "cu_window_seqlens",
    "max_window_seqlen",
    "interp_indices",
    "interp_weights",
    "bilinear_indices",
    "bilinear_weights",
)


def is_of_grids(name: str) -> bool:
    """Say whether an argument of an encoding call was worked out from the grids of all its images or frames.

    Example:
        >>> is_of_grids("video_cu_seqlens"), is_of_grids("video_grid_thw")
        (True, False)
    """
    return name.removeprefix("image_").removeprefix("video_") in _OF_GRIDS


def check_resizing(adapter: Adapter, plan: Plan) -> None:
    """Refuse models whose encoder cannot be shown smaller pictures.

    Raises:
        ValueError: naming the reason and what works instead.
    """
    method = next((method for method in plan.methods if isinstance(method, Downsample)), None)
    if method is None:
        return
    if adapter.packs_patches and any(other.vision_signals() for other in plan.methods if other is not method):
        raise ValueError(
            f"method {method.name!r} cannot run beside a method that reads the vision encoder on models of type "
            f"{adapter.model.config.model_type!r}; 'pool2d' can"
        )
    for modality in ("image", "video"):
        if not hasattr(adapter.base, f"get_{modality}_features"):
            continue
        if adapter.patches_per_side(modality) is None:
            raise ValueError(
                f"method {method.name!r} cannot resize pictures for models of type "
                f"{adapter.model.config.model_type!r}: tiles are put together, or sizes read, behind the vision "
                "encoder; 'pool2d' merges its output instead"
            )


def shrinker(adapter: Adapter, modality: str, method: BeforeLLM | None) -> Shrinker:
    """Return what a method does to the vision encoder.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        method: the method before the language model, if there is one.
    """
    if isinstance(method, Downsample):
        return Resizing(adapter, modality, method)
    if isinstance(method, EncoderMerger) and method.where == "encoder":
        return EncoderMerging(adapter, modality, method)
    return Untouched()


class Resizing:
    """Resize what the vision encoder is shown, for one modality.

    Args:
        adapter: the adapter of the model.
        modality: ``"image"`` or ``"video"``.
        method: the method.
    """

    def __init__(self, adapter: Adapter, modality: str, method: BeforeLLM) -> None:
        self.adapter = adapter
        self.modality = modality
        self.method = method

    @contextmanager
    def at_work(self, arguments: Mapping[str, Any]) -> Iterator[Shrunk]:
        """Resize as long as the context lasts.

        Args:
            arguments: arguments of ``get_{modality}_features`` by name.
        """
        kind = _Packed if self.adapter.packs_patches else _Tiles
        call, ledger = kind(self, arguments), Ledger()
        try:
            ledger.hook(call.tower.register_forward_pre_hook(call.enter, with_kwargs=True))
            ledger.hook(call.tower.register_forward_hook(call.leave))
            yield call
        finally:
            ledger.undo()


class _Tiles(Shrunk):
    """An encoder that takes pixels ``[tiles, 3, H, W]``."""

    def __init__(self, resizing: Resizing, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        adapter, modality = resizing.adapter, resizing.modality
        self.method = resizing.method
        self.tower = adapter.tower(modality)
        self.side = adapter.patches_per_side(modality) or 1
        self.first = int(adapter.class_token(modality))
        self.class_stays = bool(self.first) and adapter.keeps_class_token(modality, arguments)
        self.frames = adapter.tiles_per_item(modality, arguments)
        self.places = torch.empty(0)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Resize the pixels."""
        pixels = pixels_of(args, kwargs)
        rows, cols = patch_grid(self.tower, pixels)
        high, wide = rows // self.side, cols // self.side
        each = high * wide + self.class_stays
        kept = self.method.keep_count(self.frames * each)
        if kept >= self.frames * each:
            small = (high, wide)
        else:
            small = smaller_grid(high, wide, max(1, kept // self.frames - self.class_stays))
        cells = cell_of(high, wide, small)
        groups = cells.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1)
        groups = nn.functional.pad(groups[None].float(), (0, cols % self.side, 0, rows % self.side), mode="replicate")
        self._note_groups(groups[0].long().flatten(), len(pixels), pixels.device)
        if small == (high, wide):
            return None
        self.places = self._places(rows, cols, (high, wide), small).to(pixels.device)
        kwargs = dict(kwargs)
        height, width = patch_size(self.tower)
        resized = resized_to(pixels, (small[0] * self.side * height, small[1] * self.side * width))
        parameters = inspect.signature(self.tower.forward).parameters
        if "interpolate_pos_encoding" in parameters:
            kwargs["interpolate_pos_encoding"] = True
        mask = kwargs.get("patch_attention_mask")
        if mask is not None:
            if not bool(mask.all()):
                raise ValueError(
                    f"method {self.method.name!r} cannot resize pictures with padding (zeros in patch_attention_mask); "
                    "use 'pool2d'"
                )
            kwargs["patch_attention_mask"] = mask.new_ones(len(mask), small[0] * self.side, small[1] * self.side)
        if args:
            return (resized, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": resized}

    def _note_groups(self, cells: Tensor, tiles: int, device: torch.device) -> None:
        if self.class_stays:
            cells = torch.cat([cells.max()[None] + 1, cells])
        cells = cells.to(device)
        self.groups = cells + torch.arange(tiles, device=device)[:, None] * (cells.max() + 1)

    def _places(self, rows: int, cols: int, full: tuple[int, int], small: tuple[int, int]) -> Tensor:
        """Return for each token of the full encoder the token of the small one that it shows."""
        axes = []
        for count, tokens, fewer in zip((rows, cols), full, small, strict=True):
            patch = torch.arange(count)
            token = (patch // self.side).clamp_max(tokens - 1)
            # Patches of one visual token show the patches of one, so that joining them gives its features.
            axes.append(token * fewer // tokens * self.side + patch % self.side)
        flat = (axes[0][:, None] * small[1] * self.side + axes[1]).flatten()
        return torch.cat([torch.zeros(self.first, dtype=torch.int64), flat + self.first])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give every place the features of what it shows."""
        if not self.places.numel():
            return
        output.last_hidden_state = self.expand(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if states is None else self.expand(states) for states in output.hidden_states
            )

    def expand(self, rows: Tensor, block: int = 0) -> Tensor:
        """As in the base."""
        if not self.places.numel():
            return rows
        places = self.places.expand(len(rows), -1)
        if rows.shape[1] == int(self.places.max()) + 1:
            return gathered(rows, places)
        return gathered(rows, places[:, self.first :] - self.first)


class _Packed(Shrunk):
    """An encoder that takes the patches of all images in one sequence, merging neighbours in the end."""

    def __init__(self, resizing: Resizing, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        adapter, modality = resizing.adapter, resizing.modality
        self.method = resizing.method
        self.tower = adapter.tower(modality)
        self.side = adapter.patches_per_side(modality) or 1
        vision = self.tower.config
        self.patch, self.time = int(vision.patch_size), int(vision.temporal_patch_size)
        self.index = torch.empty(0)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fold the patches to images, resize them, and unfold them again."""
        patches: Tensor = args[0] if args else kwargs["hidden_states"]
        grids: Tensor = kwargs["grid_thw"]
        self.token_groups = []
        parts: list[Tensor] = []
        index: list[Tensor] = []
        sizes: list[tuple[int, int, int]] = []
        for part, (time, rows, cols) in zip(patches.split(grids.prod(dim=-1).tolist()), grids.tolist(), strict=True):
            full = rows // self.side, cols // self.side
            tokens = time * full[0] * full[1]
            kept = self.method.keep_count(tokens)
            small = full if kept >= tokens else smaller_grid(*full, max(1, kept // time))
            cells = cell_of(*full, small).flatten()
            own = (torch.arange(time)[:, None] * (small[0] * small[1]) + cells).flatten().to(patches.device)
            self.token_groups.append(own)
            index.append(own + sum(size[0] * size[1] * size[2] for size in sizes) // self.side**2)
            sizes.append((time, small[0] * self.side, small[1] * self.side))
            parts.append(part if small == full else self._resized(part, (time, rows, cols), sizes[-1]))
        smaller = torch.tensor(sizes, dtype=grids.dtype, device=grids.device)
        if torch.equal(smaller, grids):
            return None
        self.index = torch.cat(index)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_GRIDS}
        kwargs["grid_thw"] = smaller
        if args:
            return (torch.cat(parts), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": torch.cat(parts)}

    def _resized(self, patches: Tensor, full: tuple[int, int, int], small: tuple[int, int, int]) -> Tensor:
        pattern = "(t h w a b) (c s p q) -> (t s) c (h a p) (w b q)"
        axes = {"a": self.side, "b": self.side, "s": self.time, "p": self.patch, "q": self.patch}
        images = rearrange(patches, pattern, t=full[0], h=full[1] // self.side, w=full[2] // self.side, **axes)
        images = resized_to(images, (small[1] * self.patch, small[2] * self.patch))
        left, right = pattern.split(" -> ")
        return rearrange(images, f"{right} -> {left}", **axes)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give every visual token the features of what it shows."""
        if not self.index.numel():
            return
        output.pooler_output = output.pooler_output[self.index]
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [features[self.index] for features in deep]


def cell_of(rows: int, cols: int, small: tuple[int, int]) -> Tensor:
    """Number the cell of a smaller grid that each place of a grid lies in.

    Args:
        rows: rows of the grid.
        cols: its columns.
        small: rows and columns of the smaller grid.

    Returns:
        int64 ``[rows, cols]``.

    Example:
        >>> cell_of(2, 4, (1, 2)).tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    down, across = torch.arange(rows) * small[0] // rows, torch.arange(cols) * small[1] // cols
    return down[:, None] * small[1] + across


def resized_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images ``[B, C, H, W]``, smoothing what becomes too fine; the dtype stays.

    Example:
        >>> resized_to(torch.ones(1, 1, 4, 4), (2, 2)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    return interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False).to(images.dtype)
