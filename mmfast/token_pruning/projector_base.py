"""What learned projectors and compressors share: tables of positions, blocks of a grid, and places of the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.token_pruning.base import Merger, VisionSignal, check_choice
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.weights import check_path, prepared, share_parts, taught_so_far
from mmfast.tokens import Keep, VisualTokens

Border = Literal["average", "drop", "refuse"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LearnedMerger(Merger):
    """Replace the tokens of each image, tile or frame by what a trained module makes of them.

    The module reads the features of the vision encoder where they are known, else the embeddings. Without
    ``weights`` it is random (mechanics only).

    Attributes:
        scope: ``"per_tile"``, the default here, gives each tile or frame its share of ``keep``.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    needs = frozenset({"patch_features"})

    scope: Literal["global", "per_tile"] = "per_tile"
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path(self.weights)

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for what the vision encoder gives the projector."""
        return {"patch_features": VisionSignal("patch_features")}

    def part(self, tokens: VisualTokens, build: Callable[..., M], *sizes: int) -> M:
        """Return the trained module, on the device of the tokens and in float32."""
        return prepared(self, build, sizes, tokens.features.device)

    def at(self, keep: int | float) -> Self:
        """Return the same method with another budget, which works with the same module.

        Example:
            >>> from mmfast.registry import get
            >>> get("mqt").method(keep=16).at(4).keep
            4
        """
        other = replace(self, keep=keep)
        share_parts(self, other)
        return other

    def trained_parts(self) -> list[nn.Module]:
        """Return the modules built so far, of each model size one; they are what the method works with from now on."""
        return taught_so_far(self)


@dataclass(frozen=True)
class BlockMerger(Merger):
    """Make one token of each square block of the grid; the smallest block that meets ``keep`` is taken.

    Attributes:
        scope: ``"per_tile"``, the default here, gives each tile or frame its share of ``keep``; so does ``"global"``.
        border: what becomes of the last rows and columns where the block does not divide the grid. ``"average"``:
            smaller blocks; ``"drop"``: they are lost, as in official code; ``"refuse"``: only blocks that divide.
    """

    fits_grid = True

    scope: Literal["global", "per_tile"] = "per_tile"
    border: Border = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("border", self.border, ["average", "drop", "refuse"])

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Cut each tile or frame by itself, whatever the scope: a block crosses no border between them."""
        if raster_grid(tokens) is None and len(tokens.layout.tiles()) > 1:
            return self._per_tile(tokens, kept)
        return super().reduce(tokens, kept)

    def blocked(self, tokens: VisualTokens, kept: int) -> Blocks:
        """Choose the blocks.

        Raises:
            ValueError: if the grid is not known, or no block fits.
        """
        grid = raster_grid(tokens)
        if grid is None:
            raise ValueError(
                f"{self.name} needs to know the grid of the visual tokens, which this model's adapter cannot give for "
                "these inputs, or which is no full rectangle; pass pixel values instead of precomputed features, or "
                "use 'uniform'"
            )
        return Blocks(*grid, block_size(*grid, kept, self.border), self.border == "drop")


def block_size(rows: int, cols: int, kept: int, border: Border = "average") -> int:
    """Return the side of the smallest square block of which at most ``kept`` make up the grid.

    Args:
        rows: rows of the grid.
        cols: its columns.
        kept: most blocks; at least 1.
        border: as in :class:`BlockMerger`.

    Raises:
        ValueError: if no block divides the grid, naming the counts that are possible.

    Example:
        >>> [block_size(24, 24, kept) for kept in (576, 144, 36, 9, 1)]
        [1, 2, 4, 8, 24]
        >>> block_size(4, 6, 5, "refuse")
        Traceback (most recent call last):
        ValueError: keep leaves 5 tokens for a grid of 4 x 6, which no square block divides; possible are 24, 6, ...
    """
    for side in range(1, max(rows, cols) + 1):
        down, right = rows // side, cols // side
        divides = not rows % side and not cols % side
        if border == "average":
            down, right = -(-rows // side), -(-cols // side)
        if 0 < down * right <= kept and (divides or border != "refuse"):
            return side
    sides = [side for side in range(1, min(rows, cols) + 1) if not rows % side and not cols % side]
    possible = ", ".join(str(rows * cols // side**2) for side in sides)
    raise ValueError(
        f"keep leaves {kept} tokens for a grid of {rows} x {cols}, which no square block divides; possible are "
        f"{possible}, or any count with border='average'"
    )


@dataclass(frozen=True)
class Blocks:
    """A grid cut into square blocks, in raster order.

    Attributes:
        rows: rows of the grid.
        cols: its columns.
        side: rows and columns of a block.
        drop: leave out the last rows and columns where they fill no block; otherwise the last blocks are smaller.

    Example:
        >>> blocks = Blocks(2, 3, 2)
        >>> blocks.shape, blocks.owner().tolist()
        ((1, 2), [0, 0, 1, 0, 0, 1])
    """

    rows: int
    cols: int
    side: int
    drop: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        if self.drop:
            return self.rows // self.side, self.cols // self.side
        return -(-self.rows // self.side), -(-self.cols // self.side)

    def cut(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the tokens of each block.

        Args:
            features: ``[..., rows * cols, D]`` in raster order.

        Returns:
            ``[..., blocks, side * side, D]``, row by row inside a block and zero where there is no token, and bool
            ``[blocks, side * side]``, True where there is one.

        Example:
            >>> found, real = Blocks(2, 3, 2).cut(torch.arange(6.0)[:, None])
            >>> found.squeeze(-1).tolist(), real[1].tolist()
            ([[0.0, 1.0, 3.0, 4.0], [2.0, 0.0, 5.0, 0.0]], [True, False, True, False])
        """
        down, right = self.shape
        height, width = down * self.side, right * self.side
        grid = rearrange(features, "... (h w) d -> ... h w d", h=self.rows)[..., :height, :width, :]
        real = torch.ones(self.rows, self.cols, 1, dtype=torch.bool, device=features.device)[:height, :width]
        added = (0, 0, 0, width - grid.shape[-2], 0, height - grid.shape[-3])
        pattern = "... (a p) (b q) d -> ... (a b) (p q) d"
        cells = rearrange(functional.pad(grid, added), pattern, p=self.side, q=self.side)
        mask = rearrange(functional.pad(real, added), pattern, p=self.side, q=self.side)
        return cells, mask[..., 0]

    def mean(self, features: Tensor) -> Tensor:
        """Average the tokens of each block, ``[..., rows * cols, D]`` to ``[..., blocks, D]``."""
        cells, real = self.cut(features)
        return cells.sum(dim=-2) / real.sum(dim=-1, keepdim=True)

    def owner(self) -> Tensor:
        """Return the block of each token, int64 ``[rows * cols]``; -1 where it is left out."""
        down, right = self.shape
        row = torch.arange(self.rows)[:, None] // self.side
        col = torch.arange(self.cols)[None, :] // self.side
        return torch.where((row < down) & (col < right), row * right + col, -1).flatten()

    def keep(self, features: Tensor, space: Literal["llm", "vision"] = "llm") -> Keep:
        """Let each block stand at its middle token.

        Args:
            features: ``[blocks, D]``.
            space: of the features.
        """
        down, right = self.shape
        middle_row = [(a * self.side + min((a + 1) * self.side, self.rows) - 1) // 2 for a in range(down)]
        middle_col = [(b * self.side + min((b + 1) * self.side, self.cols) - 1) // 2 for b in range(right)]
        slots = torch.tensor([row * self.cols + col for row in middle_row for col in middle_col])
        source = self.owner()
        sizes = torch.bincount(source[source >= 0], minlength=down * right).float()
        place = features.device
        return Keep(slots.to(place), features, sizes.to(place), source.to(place), space)


def raster_grid(tokens: VisualTokens) -> tuple[int, int] | None:
    """Return rows and columns where the tokens fill one grid in raster order, else None.

    Example:
        >>> from mmfast.tokens import Layout
        >>> raster_grid(VisualTokens(torch.ones(6, 2), Layout.grid(2, 3)))
        (2, 3)
        >>> raster_grid(VisualTokens.from_features(torch.ones(6, 2))) is None
        True
    """
    layout = tokens.layout
    if not layout.grid_known:
        return None
    row, col = layout.row - layout.row.min(), layout.col - layout.col.min()
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    if rows * cols != len(tokens) or not torch.equal(row * cols + col, torch.arange(len(tokens))):
        return None
    return rows, cols


def grid_or_row(tokens: VisualTokens) -> tuple[int, int]:
    """Return the grid of the tokens; where it is not known they count as one row."""
    return raster_grid(tokens) or (1, len(tokens))


def query_keep(total: int, features: Tensor, space: Literal["llm", "vision"] = "llm") -> Keep:
    """Let what learned queries read stand at evenly spread places.

    Args:
        total: number of tokens that were read.
        features: ``[K, D]``, K at most ``total``.
        space: of the features.

    Example:
        >>> query_keep(8, torch.ones(2, 4)).indices.tolist()
        [2, 6]
    """
    return Keep(uniform_subset(total, features.shape[0]).to(features.device), features, space=space)


def square_side(kept: int) -> int:
    """Return the side of the largest square of at most ``kept`` queries.

    Example:
        >>> square_side(64), square_side(8)
        (8, 2)
    """
    return math.isqrt(kept)


def sincos(positions: Tensor, width: int) -> Tensor:
    """Encode positions as sines, then cosines, of falling frequency: ``10000 ** (-k / (width / 2))``.

    Args:
        positions: ``[n]``, may be fractions.
        width: of the code; even.

    Returns:
        float32 ``[n, width]``.

    Raises:
        ValueError: if the width is odd.

    Example:
        >>> sincos(torch.tensor([0.0]), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    if width % 2:
        raise ValueError(f"width={width} must be even for a table of sines and cosines; this model's is not")
    order = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    angle = positions.double()[:, None] * 10000.0 ** (-order / (width / 2))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sincos_grid(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Encode places in a grid: the first half of the channels tells the column, the second the row.

    Args:
        rows: ``[n]``.
        cols: ``[n]``.
        width: of the code; a multiple of 4.

    Returns:
        float32 ``[n, width]``.

    Raises:
        ValueError: if the width is no multiple of 4.

    Example:
        >>> sincos_grid(torch.tensor([0.0]), torch.tensor([0.0]), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0]]
    """
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4 for a table of rows and columns; this model's is not")
    return torch.cat([sincos(cols, width // 2), sincos(rows, width // 2)], dim=-1)


def square_table(side: int, width: int) -> Tensor:
    """Encode the places of a square grid in raster order, float32 ``[side * side, width]``.

    Example:
        >>> square_table(2, 8).shape
        torch.Size([4, 8])
    """
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return sincos_grid(rows.flatten().float(), cols.flatten().float(), width)


def resized_table(table: Tensor, rows: int, cols: int) -> Tensor:
    """Interpolate the table of a square grid, bicubically, to the grid there is.

    Args:
        table: ``[side * side, D]`` in raster order.
        rows: rows of the grid.
        cols: its columns.

    Returns:
        ``[rows * cols, D]``.

    Example:
        >>> resized_table(torch.ones(1, 4), 2, 3).shape
        torch.Size([6, 4])
    """
    side = math.isqrt(table.shape[0])
    square = rearrange(table, "(h w) d -> 1 d h w", h=side)
    found = functional.interpolate(square, size=(rows, cols), mode="bicubic", align_corners=False)
    return rearrange(found, "1 d h w -> (h w) d")


def check_heads(heads: int, width: int) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        ValueError: naming both.

    Example:
        >>> check_heads(8, 12)
        Traceback (most recent call last):
        ValueError: heads=8 must divide the width 12 of the module
    """
    if width % heads:
        raise ValueError(f"heads={heads} must divide the width {width} of the module")


def check_positive(**values: int) -> None:
    """Refuse options that are no int of at least 1.

    Raises:
        ValueError: naming the option.

    Example:
        >>> check_positive(heads=0)
        Traceback (most recent call last):
        ValueError: heads=0 must be an int of at least 1
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an int of at least 1")


def small_start(module: nn.Module) -> None:
    """Draw the weights of linear layers from a normal distribution of deviation 0.02, cut at two, with biases 0.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> small_start(layer)
        >>> bool((layer.bias == 0).all())
        True
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
