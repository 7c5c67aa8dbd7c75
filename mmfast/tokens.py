"""What is known of visual tokens, and what a method says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """

    modality: str
    frame: Tensor
    tile: Tensor
    row: Tensor
    col: Tensor
    is_newline: Tensor
    boxes: Tensor | None = None
    grid_known: bool = True

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
        )


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of ONE image or video, as a method before the LLM sees them.

    Attributes:
        features: ``[N, D]`` projected features, the embeddings the language model would read.
        layout: where each token lies.
        index: which image or video of its prompt this is (0 = first).
        signals: further tensors the method declared in ``needs``, by name.
    """

    features: Tensor
    layout: Layout
    index: int = 0
    signals: Mapping[str, Tensor] = field(default_factory=dict)

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
        places = indices.cpu()
        layout = Layout(
            self.layout.modality,
            self.layout.frame[places],
            self.layout.tile[places],
            self.layout.row[places],
            self.layout.col[places],
            self.layout.is_newline[places],
            None if self.layout.boxes is None else self.layout.boxes[places],
            self.layout.grid_known,
        )
        signals = {name: value[indices] if _per_token(name) else value for name, value in self.signals.items()}
        return VisualTokens(self.features[indices], layout, self.index, signals)


def _per_token(signal: str) -> bool:
    """Text signals describe the question; all others have the visual tokens as first axis."""
    return not signal.startswith("text_")


@dataclass(frozen=True)
class Keep:
    """What survives, and what was merged into it.

    Attributes:
        indices: ``[K]`` int64, ascending, unique: the slots that stay.
        features: ``[K, D]`` features that replace those of the kept slots, or None to leave them.
        sizes: ``[K]`` float32, how many input tokens each kept slot stands for, or None for ones.
        source: ``[N]`` int64, for each input token the position in ``indices`` it was merged into,
            -1 where it was dropped; or None when nothing was merged.
    """

    indices: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None

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
