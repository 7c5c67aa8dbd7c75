"""What is known of visual tokens, and what a method says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one image or video lie; every tensor is ``[N]`` and on the CPU.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        frame: int64, frame (or temporal patch) of each token; -1 where it belongs to none.
        tile: int64, tile of an image that is cut into tiles; 0 is the whole image in AnyRes models.
        row, col: int64, place inside the grid of the tile; -1 for newline tokens' columns.
        is_newline: bool, learned end-of-row tokens that carry no patch.
        boxes: float32 ``[N, 4]``, the patch as (left, top, right, bottom) in fractions of the whole
            image or frame, for drawing; None where the family cannot say.
        grid_known: False when the family gave only the number of tokens.
        crop: int64, for AnyRes images the crop each token was cut from (row-major, 0-based), -1 for the
            whole image and for newline tokens; ``row`` and ``col`` of crops count over the grid of all
            crops. None where nothing is cut.
        crop_grid: rows and columns of crops; (0, 0) where nothing is cut.
    """

    modality: str
    frame: Tensor
    tile: Tensor
    row: Tensor
    col: Tensor
    is_newline: Tensor
    boxes: Tensor | None = None
    grid_known: bool = True
    crop: Tensor | None = None
    crop_grid: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return int(self.frame.numel())

    @staticmethod
    def grid(height: int, width: int, *, frames: int = 1, modality: str = "image") -> Layout:
        """Lay out ``frames`` plain grids of ``height x width`` tokens in raster order.

        Example:
            >>> layout = Layout.grid(2, 3)
            >>> layout.row.tolist(), layout.col.tolist()
            ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
        """
        frame, row, col = (
            axis.reshape(-1)
            for axis in torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
        )
        boxes = torch.stack([col / width, row / height, (col + 1) / width, (row + 1) / height], dim=-1).float()
        zeros = torch.zeros_like(frame)
        return Layout(modality, frame, zeros, row, col, zeros.bool(), boxes)

    @staticmethod
    def unknown(count: int, modality: str = "image") -> Layout:
        """Describe ``count`` tokens of which only the order is known.

        Example:
            >>> Layout.unknown(5).grid_known
            False
        """
        order = torch.arange(count)
        zeros = torch.zeros_like(order)
        return Layout(modality, zeros, zeros, zeros, order, zeros.bool(), grid_known=False)

    def take(self, places: Tensor) -> Layout:
        """Narrow to some tokens.

        Example:
            >>> Layout.grid(2, 2).take(torch.tensor([1, 3])).col.tolist()
            [1, 1]
        """
        return replace(
            self,
            frame=self.frame[places],
            tile=self.tile[places],
            row=self.row[places],
            col=self.col[places],
            is_newline=self.is_newline[places],
            boxes=None if self.boxes is None else self.boxes[places],
            crop=None if self.crop is None else self.crop[places],
        )

    def tiles(self) -> list[Tensor]:
        """Group the tokens by frame, tile and crop; newline tokens are left out.

        Returns:
            int64 places of each group, in the order of the prompt.

        Example:
            >>> [part.tolist() for part in Layout.grid(1, 2, frames=2).tiles()]
            [[0, 1], [2, 3]]
        """
        crop = torch.full_like(self.tile, -1) if self.crop is None else self.crop
        keys = torch.stack([self.frame, self.tile, crop], dim=-1)
        keys = keys.masked_fill(self.is_newline[:, None], -2)
        groups = [(keys == key).all(dim=-1).nonzero().squeeze(-1) for key in torch.unique(keys, dim=0)]
        return sorted((part for part in groups if not bool(self.is_newline[part[0]])), key=lambda part: int(part[0]))

    def with_newline(self) -> Layout:
        """Append one newline token that belongs to no frame.

        Example:
            >>> len(Layout.grid(2, 2).with_newline())
            5
        """
        minus = torch.full((1,), -1)
        boxes = None if self.boxes is None else torch.cat([self.boxes, torch.zeros(1, 4)])
        return Layout(
            self.modality,
            torch.cat([self.frame, minus]),
            torch.cat([self.tile, minus]),
            torch.cat([self.row, minus]),
            torch.cat([self.col, minus]),
            torch.cat([self.is_newline, torch.ones(1, dtype=torch.bool)]),
            boxes,
            self.grid_known,
            None if self.crop is None else torch.cat([self.crop, minus]),
            self.crop_grid,
        )


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of ONE image or video, as a method before the LLM sees them.

    Attributes:
        features: ``[N, D]`` projected features, the embeddings the language model would read.
        layout: where each token lies.
        index: which image or video of its prompt this is (0 = first).
        signals: further tensors the method declared in ``needs`` or ``vision_signals``, by name.
        projectable: whether ``patch_features`` become ``features`` token by token, so that merged ones
            may be returned and projected afterwards.
    """

    features: Tensor
    layout: Layout
    index: int = 0
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    projectable: bool = False

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.shape[0] != len(self.layout):
            raise ValueError(
                f"features must be [N, D] with N = {len(self.layout)} tokens of the layout, "
                f"got shape {tuple(self.features.shape)}"
            )

    @staticmethod
    def from_features(features: Tensor, **signals: Tensor) -> VisualTokens:
        """Wrap bare features ``[N, D]`` whose places are unknown.

        Example:
            >>> len(VisualTokens.from_features(torch.ones(6, 4)))
            6
        """
        return VisualTokens(features, Layout.unknown(features.shape[0]), signals=signals)

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def take(self, indices: Tensor) -> VisualTokens:
        """Narrow to some tokens, all metadata included.

        Args:
            indices: ``[K]`` int64 positions.

        Example:
            >>> VisualTokens.from_features(torch.eye(4)).take(torch.tensor([1, 3])).features.shape
            torch.Size([2, 4])
        """
        signals = {name: value[indices] if _per_token(name) else value for name, value in self.signals.items()}
        layout = self.layout.take(indices.cpu())
        return VisualTokens(self.features[indices], layout, self.index, signals, self.projectable)


def _per_token(signal: str) -> bool:
    """Text signals describe the question, class tokens the tiles; all others the visual tokens."""
    return not signal.startswith(("text_", "clip_text_", "cls_features"))


@dataclass(frozen=True)
class Keep:
    """What survives, and what was merged into it.

    Attributes:
        indices: ``[K]`` int64, ascending, unique: the slots that stay.
        features: ``[K, D]`` features that replace those of the kept slots, or None to leave them.
        sizes: ``[K]`` float32, how many input tokens each kept slot stands for, or None for ones.
        source: ``[N]`` int64, for each input token the position in ``indices`` it was merged into,
            -1 where it was dropped; or None when nothing was merged.
        space: ``"vision"`` when ``features`` are features of the vision encoder, which the model's
            projector still has to turn into embeddings.
    """

    indices: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    space: Literal["llm", "vision"] = "llm"

    def __post_init__(self) -> None:
        indices = self.indices
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"indices must be a 1-D int64 tensor, got {indices.dtype} {tuple(indices.shape)}")
        if indices.numel() > 1 and not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError("indices must be strictly ascending; sort them before building Keep")
        if self.features is not None and self.features.shape[0] != indices.numel():
            raise ValueError(
                f"features has {self.features.shape[0]} rows for {indices.numel()} kept tokens; they must match"
            )

    def __len__(self) -> int:
        return int(self.indices.numel())
