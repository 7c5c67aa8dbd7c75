"""Where each visual token lies: the adapters' answer against grids written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

import mmfast
from mmfast.adapters.base import square_or_unknown
from mmfast.tokens import Layout
from support.cases import CASES, case_id
from support.checks import first_logits
from support.families import FAMILIES, Batch, Family
from support.families.anyres import PINPOINTS, SIDE, TILE, LlavaOnevision
from support.prompts import noise
from support.reference import items_of
from support.trials import listed


def check_boxes(layout: Layout) -> None:
    """Boxes of patches tile the picture: inside it, from edge to edge, and as the rows and columns say."""
    assert layout.boxes is not None
    patches = ~layout.is_newline & (layout.col >= 0)
    for tile in layout.tile[patches].unique().tolist():
        mine = patches & (layout.tile == tile)
        left, top, right, bottom = layout.boxes[mine].unbind(-1)
        assert bool((left < right).all())
        assert bool((top < bottom).all())
        edges = torch.stack([left.min(), top.min(), right.max(), bottom.max()])
        assert torch.allclose(edges, torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-6)
        col, row = layout.col[mine], layout.row[mine]
        assert torch.allclose(left, col / (col.max() + 1), atol=1e-6)
        assert torch.allclose(top, row / (row.max() + 1), atol=1e-6)


@pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
@pytest.mark.parametrize("ahead", [False, True], ids=["forward", "generate"])
def test_layouts_are_those_of_the_processor(family: Family, case: Callable[[Family], Batch], ahead: bool) -> None:
    model, batch = family.model(), case(family)
    with mmfast.accelerate(model, "uniform(keep=0.5)") as fast:
        if ahead:
            model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
        else:
            first_logits(model, batch.inputs)
        records = fast.report().media
    items = [item for row in range(len(batch)) for item in items_of(batch.alone(row))]
    assert len(records) == len(items)
    for record, item in zip(records, items, strict=True):
        found, wanted = record.layout, item.layout
        assert (record.modality, record.tokens) == (item.modality, len(wanted))
        assert (found.modality, found.grid_known) == (item.modality, wanted.grid_known)
        assert found.is_newline.tolist() == wanted.is_newline.tolist()
        patches = ~wanted.is_newline
        assert found.row[patches].tolist() == wanted.row[patches].tolist()
        assert found.col.tolist() == wanted.col.tolist()
        assert found.frame[patches].tolist() == wanted.frame[patches].tolist()
        assert found.tile[patches].tolist() == wanted.tile[patches].tolist()
        assert (found.crop_grid, listed(found.crop)) == (wanted.crop_grid, listed(wanted.crop))
        # A newline belongs to the row it ends; the one after a whole image or video belongs to none.
        assert (found.row[~patches] < 0).tolist() == (wanted.row[~patches] < 0).tolist()
        if found.grid_known:
            check_boxes(found)


# ------------------------------------------------------------------------ AnyRes, in many sizes


class Shrunk(LlavaOnevision):
    """A checkpoint that allows fewer tiles than the crops have."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles

    def config(self) -> Any:
        config = super().config()
        config.image_grid_pinpoints = [*PINPOINTS, [3 * TILE, 2 * TILE], [TILE, 3 * TILE]]
        config.vision_aspect_ratio = f"anyres_max_{self.tiles}"
        return config

    def first_prompt(self) -> Batch:
        return self.batch([4])


ANYRES: list[Family] = [FAMILIES["llava_next"], FAMILIES["llava_next_video"], FAMILIES["llava_onevision"]]
SHRUNK: list[Family] = [Shrunk(tiles) for tiles in (1, 2, 3, 9)]
SIZES = [(8, 8), (8, 16), (16, 8), (16, 16), (5, 16), (16, 5), (12, 8), (7, 11), (100, 30), (30, 100), (24, 16), (1, 3)]


def named(value: object) -> str | None:
    if isinstance(value, Shrunk):
        return f"shrunk-to-{value.tiles}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else case_id(value)


@pytest.mark.parametrize("family", ANYRES + SHRUNK, ids=named)
@pytest.mark.parametrize("size", SIZES, ids=named)
def test_anyres_layouts_fit_the_features(family: Family, size: tuple[int, int]) -> None:
    """Newline tokens are known by their features: they all are the model's one newline embedding."""
    model = family.model()
    tiles = image_size_to_num_patches(size, model.config.image_grid_pinpoints, TILE)
    pixels = noise(1, tiles, 3, TILE, TILE, seed=0)
    with mmfast.accelerate(model, "uniform()"), torch.no_grad():
        output = model.model.get_image_features(pixels, image_sizes=torch.tensor([size]), return_dict=True)
        (layout,) = output._mmfast_layouts
    (features,) = output.pooler_output
    assert len(layout) == len(features)
    assert layout.grid_known
    newline = (features == model.model.image_newline).all(dim=-1)
    assert layout.is_newline.tolist() == newline.tolist()
    check_grid(layout)
    check_boxes(layout)


def check_grid(layout: Layout) -> None:
    """The whole image comes first, then rows of the crops, each with a newline at its end."""
    whole = SIDE * SIDE
    assert layout.tile.tolist() == [0] * whole + [1] * (len(layout) - whole)
    assert layout.row[:whole].tolist() == [place // SIDE for place in range(whole)]
    ends = layout.is_newline[whole:].nonzero().squeeze(-1)
    rows = len(ends)
    width = int(ends[0]) + 1
    assert len(layout) - whole == rows * width
    assert layout.row[whole:].tolist() == [row for row in range(rows) for _ in range(width)]
    assert layout.col[whole:].tolist() == [*range(width - 1), -1] * rows


def test_shrinking_is_tested() -> None:
    """At least one of the sizes above is shrunk by the model's own packing, or the test above proves nothing."""
    lengths = {}
    for family in SHRUNK:
        model = family.model()
        tiles = image_size_to_num_patches((24, 16), model.config.image_grid_pinpoints, TILE)
        with torch.no_grad():
            output = model.model.get_image_features(
                noise(1, tiles, 3, TILE, TILE, seed=0), image_sizes=torch.tensor([(24, 16)]), return_dict=True
            )
        lengths[family.tiles] = len(output.pooler_output[0])
    assert lengths[1] < lengths[2] < lengths[3] < lengths[9] == SIDE**2 + 12 * 9


@pytest.mark.parametrize("family", ANYRES + SHRUNK, ids=named)
@pytest.mark.parametrize("size", SIZES, ids=named)
def test_crops_are_those_the_tokens_were_cut_from(family: Family, size: tuple[int, int]) -> None:
    """Tiles are encoded one by one, so other pixels in one of them change its own tokens only."""
    model = family.model()
    high, wide = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, TILE)
    pixels = noise(1, 1 + high * wide, 3, TILE, TILE, seed=0)
    sizes = torch.tensor([size])
    with mmfast.accelerate(model, "uniform()"), torch.no_grad():
        output = model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True)
        (layout,) = output._mmfast_layouts
    assert layout.crop_grid == (high, wide)
    reached: list[set[int]] = [set() for _ in range(len(layout))]
    for tile in range(1 + high * wide):
        changed = pixels.clone()
        changed[0, tile] = noise(3, TILE, TILE, seed=1)
        with torch.no_grad():
            after = model.model.get_image_features(changed, image_sizes=sizes, return_dict=True).pooler_output[0]
        for token in (after != output.pooler_output[0]).any(dim=-1).nonzero().flatten().tolist():
            reached[token].add(tile - 1)
    for crop, tiles in zip(layout.crop.tolist(), reached, strict=True):
        # A shrunk token between two crops belongs to one of them, a newline token to none.
        assert crop in (tiles or {-1})
    crops = sorted({crop for crop in layout.crop.tolist() if crop >= 0})
    assert [layout.crop[part].unique().tolist() for part in layout.tiles()] == [[-1], *([crop] for crop in crops)]


@pytest.mark.parametrize("tiles", [1, 2, 3, 9])
def test_a_shrunk_token_belongs_to_the_crop_of_its_centre(tiles: int) -> None:
    """A token belongs to the crop in which its centre lies."""
    family = Shrunk(tiles)
    model = family.model()
    with mmfast.accelerate(model, "uniform()"), torch.no_grad():
        output = model.model.get_image_features(
            noise(1, 7, 3, TILE, TILE, seed=0), image_sizes=torch.tensor([(24, 16)]), return_dict=True
        )
        (layout,) = output._mmfast_layouts
    patches = (layout.tile == 1) & ~layout.is_newline
    rows, cols = (int(axis[patches].max()) + 1 for axis in (layout.row, layout.col))
    for crop in range(6):
        mine = layout.crop == crop
        down, across = divmod(crop, 2)
        # The centre of a token in patches, from the size of the grid alone.
        inside = ((layout.row + 0.5) * 12 / rows // 4 == down) & ((layout.col + 0.5) * 8 / cols // 4 == across)
        assert mine.tolist() == (patches & inside).tolist()


def test_a_single_tile_is_not_cut() -> None:
    family = FAMILIES["llava_onevision"]
    batch = family.batch([2, family.image(0, 1), 2, family.image(1, 2)])
    with mmfast.accelerate(family.model(), "uniform()") as fast:
        first_logits(family.model(), batch.inputs)
        for record in fast.report().media:
            assert record.layout.crop is None
            assert record.layout.crop_grid == (0, 0)
            assert len(record.layout.tiles()) == 1


# ---------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("tokens", [1, 4, 16, 25])
def test_squares_are_grids(tokens: int) -> None:
    layout = square_or_unknown(tokens, "video")
    assert (layout.grid_known, layout.modality, len(layout)) == (True, "video", tokens)
    check_boxes(layout)


@pytest.mark.parametrize("tokens", [2, 15, 17])
def test_other_numbers_are_no_grids(tokens: int) -> None:
    layout = square_or_unknown(tokens)
    assert (layout.grid_known, len(layout), layout.boxes) == (False, tokens, None)
