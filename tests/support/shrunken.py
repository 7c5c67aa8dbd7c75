"""A vision encoder that runs on fewer tokens, worked out by hand: one row at a time, eager, without hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmfast.token_pruning.base import Method
from mmfast.token_pruning.before_llm.downsample import Downsample
from mmfast.token_pruning.before_llm.pool2d import pooled_grid
from mmfast.token_pruning.encoder_base import EncoderMerger, EncoderTokens

MERGES_INSIDE = ("llava", "vipllava", "video_llava", "paligemma")
"""Families whose encoder may merge tokens; in the others neighbours are joined, or tiles packed, behind it."""


def acting(method: Method | None, family: str) -> Method | None:
    """Return the method, told where it acts, if it shrinks the encoder of a family."""
    if isinstance(method, EncoderMerger):
        inside = method.where == "encoder" or (method.where is None and family in MERGES_INSIDE)
        return replace(method, where="encoder") if inside else None
    return method if isinstance(method, Downsample) else None


@dataclass
class Shrunken:
    """What came out, per modality and in the order of the encoder's rows.

    Attributes:
        groups: per visual token of an item, which token of the encoder it shows.
        attention: per visual token, what the class token, or on average every token, pays to it.
        entered: the tokens that each block ran on, of every row.
        states: of every row, what each block gave, ``[places, C]``; first what entered the first.
    """

    groups: dict[str, list[Tensor]] = field(default_factory=dict)
    attention: dict[str, list[Tensor]] = field(default_factory=dict)
    entered: list[list[int]] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)


@contextmanager
def shrunken(model: Any, method: Method, items: Sequence[Any]) -> Iterator[Shrunken]:
    """Let the encoder run on fewer tokens.

    Args:
        model: the untouched model.
        method: as :func:`acting` returns it.
        items: images and videos of the one prompt, with ``modality`` and ``layout``.
    """
    found, towers = Shrunken(), {}
    for modality in dict.fromkeys(item.modality for item in items):
        layouts = [item.layout for item in items if item.modality == modality]
        tower = _tower(model, modality)
        kind = _Packed if hasattr(tower, "merger") else _Smaller if isinstance(method, Downsample) else _Merging
        towers.setdefault(tower, []).append((modality, kind(model, tower, method, modality, layouts, found)))
    for tower, runs in towers.items():
        tower.forward = _in_turn([run for _, run in sorted(runs, key=lambda pair: pair[0])], tower.forward)
    try:
        yield found
    finally:
        for tower in towers:
            del tower.forward


def _tower(model: Any, modality: str) -> Any:
    own = getattr(model.base_model, f"{modality}_tower", None)
    return own or model.get_encoder(modality="image")


def _in_turn(runs: list[Any], forward: Any) -> Any:
    """Images are encoded before videos."""
    waiting = list(runs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop(0)(forward, *args, **kwargs)

    return run


def _share(method: Any, layout: Any) -> tuple[int, int, int, int]:
    """Return frames, rows, columns and class tokens per frame of an image or video."""
    frames = int(layout.frame.max()) + 1
    classes = int((layout.row < 0).sum()) // frames
    return frames, int(layout.row.max()) + 1, int(layout.col.max()) + 1, classes


class _Run:
    def __init__(self, model: Any, tower: Any, method: Any, modality: str, layouts: list[Any], found: Shrunken) -> None:
        self.model, self.tower, self.method, self.modality, self.layouts, self.found = (
            model,
            tower,
            method,
            modality,
            layouts,
            found,
        )
        self.first = int(any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters()))


class _Smaller(_Run):
    """Tiles of pixels, shown smaller."""

    def __call__(self, forward: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
        frames, rows, cols, classes = _share(self.method, self.layouts[0])
        size = self.tower.config.patch_size
        size = size if isinstance(size, int) else size[0]
        patches = pixel_values.shape[-1] // size
        side = patches // cols
        each = rows * cols + classes
        kept = self.method.keep_count(frames * each)
        small = (rows, cols) if kept >= frames * each else pooled_grid(rows, cols, max(1, kept // frames - classes))
        pixels = torch.nn.functional.interpolate(
            pixel_values, (small[0] * side * size, small[1] * side * size), mode="bilinear", antialias=True
        )
        if self.tower.config.model_type in ("clip_vision_model", "siglip_vision_model"):
            kwargs["interpolate_pos_encoding"] = True
        if "patch_attention_mask" in kwargs:
            kwargs["patch_attention_mask"] = torch.ones(len(pixels), small[0] * side, small[1] * side).bool()
        output = forward(pixels if small != (rows, cols) else pixel_values, **kwargs)
        order = list(range(self.first))
        for row in range(patches):
            for col in range(patches):
                down = (row // side * small[0] // rows) * side + row % side
                across = (col // side * small[1] // cols) * side + col % side
                order.append(self.first + down * small[1] * side + across)
        output.last_hidden_state = output.last_hidden_state[:, order]
        if output.hidden_states is not None:
            output.hidden_states = [None if each is None else each[:, order] for each in output.hidden_states]
        for layout in self.layouts:
            self.found.groups.setdefault(self.modality, []).append(_cells(layout, rows, cols, small))
        return output


def _cells(layout: Any, rows: int, cols: int, small: tuple[int, int]) -> Tensor:
    """Number the cells; a class token is a cell of its own."""
    cells = []
    for frame, row, col in zip(layout.frame.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True):
        cell = -1 if row < 0 else (row * small[0] // rows) * small[1] + col * small[1] // cols
        cells.append(frame * 1000 + cell)
    return torch.tensor(cells)


class _Packed(_Run):
    """All patches in one sequence, shown smaller."""

    def __call__(self, forward: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        vision = self.tower.config
        side, size, time = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        images, grids, order, start, done = [], [], [], 0, 0
        for layout, (frames, high, wide) in zip(self.layouts, grid_thw.tolist(), strict=True):
            part = hidden_states[start : start + frames * high * wide]
            start += len(part)
            rows, cols = high // side, wide // side
            kept = self.method.keep_count(len(layout))
            small = (rows, cols) if kept >= len(layout) else pooled_grid(rows, cols, max(1, kept // frames))
            picture = _folded(part, frames, rows, cols, side, size, time)
            if small != (rows, cols):
                shape = (small[0] * side * size, small[1] * side * size)
                picture = torch.nn.functional.interpolate(picture, shape, mode="bilinear", antialias=True)
            images.append(_unfolded(picture, frames, *small, side, size, time))
            grids.append([frames, small[0] * side, small[1] * side])
            cells = _cells(layout, rows, cols, small)
            self.found.groups.setdefault(self.modality, []).append(cells)
            order += [done + cell // 1000 * small[0] * small[1] + cell % 1000 for cell in cells.tolist()]
            done += frames * small[0] * small[1]
        output = forward(torch.cat(images), grid_thw=torch.tensor(grids), **kwargs)
        output.pooler_output = output.pooler_output[order]
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [each[order] for each in output.deepstack_features]
        return output


def _folded(patches: Tensor, frames: int, rows: int, cols: int, side: int, size: int, time: int) -> Tensor:
    """Put patches together: ``[frames * time, 3, H, W]``."""
    picture = torch.zeros(frames * time, 3, rows * side * size, cols * side * size)
    for place, (frame, top, left) in enumerate(_places(frames, rows, cols, side)):
        patch = patches[place].view(3, time, size, size).transpose(0, 1)
        picture[
            frame * time : (frame + 1) * time, :, top * size : top * size + size, left * size : left * size + size
        ] = patch
    return picture


def _unfolded(picture: Tensor, frames: int, rows: int, cols: int, side: int, size: int, time: int) -> Tensor:
    """Take a picture apart."""
    patches = []
    for frame, top, left in _places(frames, rows, cols, side):
        patch = picture[
            frame * time : (frame + 1) * time, :, top * size : top * size + size, left * size : left * size + size
        ]
        patches.append(patch.transpose(0, 1).reshape(-1))
    return torch.stack(patches)


def _places(frames: int, rows: int, cols: int, side: int) -> Iterator[tuple[int, int, int]]:
    """Walk through the patches, merged squares one after the other."""
    for frame in range(frames):
        for row in range(rows):
            for col in range(cols):
                for down in range(side):
                    for across in range(side):
                        yield frame, row * side + down, col * side + across


class _Merging(_Run):
    """Tokens merged between the blocks."""

    def __call__(self, forward: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
        output = forward(pixel_values, **kwargs)
        frames, rows, cols, classes = _share(self.method, self.layouts[0])
        each = rows * cols + classes
        kept = self.method.keep_count(frames * each)
        schedule = {}
        used = getattr(self.model.config, "vision_feature_layer", -1)
        used = [used] if isinstance(used, int) else used
        depth = len(self.tower.encoder.layers)
        feature = max(index % (depth + 1) for index in used) - 1
        if kept < frames * each:
            schedule = self.method.schedule(feature, rows * cols, max(1, math.ceil(kept / frames) - classes))
        tiles = [self._tile(pixels[None], schedule, feature, (rows, cols)) for pixels in pixel_values]
        if output.hidden_states is not None:
            # Where features of several blocks are joined, each is that of the tokens there are in the end.
            output.hidden_states = [
                None if state is None else torch.cat([states[index] for states, _, _ in tiles])
                for index, state in enumerate(output.hidden_states)
            ]
        last = torch.cat([states[-1] for states, _, _ in tiles])
        norm = getattr(self.tower, "post_layernorm", None)
        output.last_hidden_state = last if self.first or norm is None else norm(last)
        skip = self.first - classes
        for start in range(0, len(tiles), frames):
            groups, attention = [], []
            for index, (_, source, weights) in enumerate(tiles[start : start + frames]):
                groups.append(torch.tensor(source[skip:]) + 1000 * index)
                patches = weights[source[self.first :]]
                attention.append(torch.cat([patches.mean()[None]] * classes + [patches]))
            self.found.groups.setdefault(self.modality, []).append(torch.cat(groups))
            self.found.attention.setdefault(self.modality, []).append(torch.cat(attention))
        return output

    def _tile(
        self, pixels: Tensor, schedule: dict[int, int], feature: int, grid: tuple[int, int]
    ) -> tuple[list[Tensor], list[int], Tensor]:
        """Return the hidden states of all places, the last token of each place, and attention per last token."""
        tower = self.tower
        hidden = tower.embeddings(pixels)
        hidden = (tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden)[0]
        places = len(hidden)
        source, sizes = list(range(places)), torch.ones(places)
        states, entered = [(hidden, list(source))], []
        for index, block in enumerate(tower.encoder.layers):
            entered.append(len(hidden))
            before = list(source)
            hidden, weights, keys = self._block(block, hidden, sizes)
            states.append((hidden, before))
            wanted = schedule.get(index)
            if wanted is None or wanted + self.first >= len(hidden):
                continue
            tokens = EncoderTokens(hidden, keys, sizes, grid, bool(self.first))
            stands, into = self.method.merge_block(tokens, wanted + self.first)
            merged = torch.stack(
                [
                    sum(hidden[old] * sizes[old] for old in range(len(hidden)) if into[old] == new)
                    / sum(sizes[old] for old in range(len(hidden)) if into[old] == new)
                    for new in range(len(stands))
                ]
            )
            sizes = torch.tensor(
                [float(sum(sizes[old] for old in range(len(hidden)) if into[old] == new)) for new in range(len(stands))]
            )
            hidden, source = merged, [int(into[old]) for old in source]
        self.found.entered.append(entered)
        final = [torch.stack([state[token] for token in tokens]) for state, tokens in states]
        self.found.states.append(final)
        members = [[place for place in range(places) if source[place] == token] for token in range(len(hidden))]
        pooled = [
            torch.stack([state[members[source[place]]].mean(dim=0) for place in range(places)])[None] for state in final
        ]
        row = weights.mean(dim=0)
        attention = row[0, 1:] if self.first else row.mean(dim=0)
        return pooled, source, torch.cat([attention.new_zeros(self.first), attention])

    def _block(self, block: Any, hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One block on ``[n, C]``: its output, its attention ``[H, n, n]``, and the mean of its heads' keys."""
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        heads = attention.num_heads
        query, key, value = (
            projection(normed).view(len(hidden), heads, -1).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        if self.method.weighs:
            logits = logits + sizes.log()
        weights = logits.softmax(dim=-1)
        hidden = hidden + attention.out_proj((weights @ value).transpose(0, 1).flatten(1))
        return hidden + block.mlp(block.layer_norm2(hidden)), weights, key.mean(dim=0)
