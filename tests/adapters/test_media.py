"""Which placeholders belong to which image or video."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmfast.adapters.media import feature_source, items_of, modalities, placeholder_masks, segments, tag, tagged
from mmfast.tokens import Layout


def places(*rows: str) -> Tensor:
    """Write rows with ``x`` for a placeholder."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def grid(tokens: int) -> Layout:
    return Layout.grid(1, tokens)


def slots(found: list[list]) -> list[list[list[int]]]:
    return [[part.slots.tolist() for part in row] for row in found]


def test_rows_take_what_they_need() -> None:
    visual = places(".xx.xxx.", "...xx...", "........")
    layouts = [grid(2), grid(3), grid(2)]
    found = segments({"image": visual}, {"image": layouts})
    assert slots(found) == [[[1, 2], [4, 5, 6]], [[3, 4]], []]
    assert [part.layout for row in found for part in row] == layouts


def test_an_image_may_have_text_between_its_tokens() -> None:
    found = segments({"image": places(".xx.xx.xx.")}, {"image": [grid(4), grid(2)]})
    assert slots(found) == [[[1, 2, 4, 5], [7, 8]]]


def test_images_without_a_gap_are_told_apart() -> None:
    assert slots(segments({"image": places(".xxxxx.")}, {"image": [grid(2), grid(3)]})) == [[[1, 2], [3, 4, 5]]]


def test_modalities_come_in_the_order_of_the_prompt() -> None:
    found = segments(
        {"image": places(".....xx."), "video": places(".xxx....")},
        {"image": [grid(2)], "video": [Layout.grid(1, 1, frames=3, modality="video")]},
    )
    assert slots(found) == [[[1, 2, 3], [5, 6]]]
    assert [part.layout.modality for part in found[0]] == ["video", "image"]


def test_beams_share_the_images_of_their_prompt() -> None:
    first, second = ".xx.xxx.", "...xx..."
    layouts = [grid(2), grid(3), grid(2)]
    found = segments({"image": places(first, first, first, second, second, second)}, {"image": layouts})
    assert slots(found) == [[[1, 2], [4, 5, 6]]] * 3 + [[[3, 4]]] * 3
    assert all(row[0].layout is layouts[0] for row in found[:3])
    assert all(row[0].layout is layouts[2] for row in found[3:])


def test_beams_of_prompts_without_images() -> None:
    found = segments({"image": places("...", "...", "xx.", "xx.")}, {"image": [grid(2)]})
    assert slots(found) == [[], [], [[0, 1]], [[0, 1]]]


def test_layouts_that_do_not_fit_are_not_believed() -> None:
    """Then each unbroken run is one item of which only the order is known."""
    for layouts in ([], [grid(4)], [grid(2), grid(4)]):
        found = segments({"image": places(".xx.xxx.", "...xx...")}, {"image": layouts})
        assert slots(found) == [[[1, 2], [4, 5, 6]], [[3, 4]]]
        assert not any(part.layout.grid_known for row in found for part in row)


@given(
    images=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=4),
    beams=st.integers(1, 3),
    gap=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_every_placeholder_is_handed_out_once(images: list[list[int]], beams: int, gap: int) -> None:
    rows = ["." + "".join("x" * count + "." * gap for count in row) for row in images]
    longest = max(map(len, rows))
    padded = [row.rjust(longest, ".") for row in rows for _ in range(beams)]
    layouts = [grid(count) for row in images for count in row]
    visual = places(*padded)
    found = segments({"image": visual}, {"image": layouts})
    for row, parts in enumerate(found):
        handed_out = [slot for part in parts for slot in part.slots.tolist()]
        assert handed_out == visual[row].nonzero().squeeze(-1).tolist()
    if layouts:
        assert [[len(part.slots) for part in row] for row in found] == [row for row in images for _ in range(beams)]


def test_only_features_make_a_placeholder_an_image() -> None:
    pixels, encoded = torch.zeros(1), BaseModelOutputWithPooling()
    assert modalities({"input_ids": torch.zeros(1, 1)}) == set()
    assert modalities({"pixel_values": None, "mm_encoder_outputs": {}}) == set()
    assert modalities({"pixel_values": pixels}) == {"image"}
    assert modalities({"pixel_values_images": pixels, "pixel_values_videos": pixels}) == {"image", "video"}
    assert modalities({"mm_encoder_outputs": {"image": None, "video": encoded}}) == {"video"}


def test_the_same_features_are_known_by_their_source() -> None:
    pixels, encoded = torch.zeros(1), BaseModelOutputWithPooling()
    assert feature_source({"pixel_values": pixels}) is pixels
    assert feature_source({"pixel_values": None, "mm_encoder_outputs": {"image": encoded}}) is encoded
    assert feature_source({}) is None


def test_features_come_one_item_each_whatever_their_form() -> None:
    flat = torch.zeros(6, 4)
    for pooled, wanted in (
        (flat, [6]),
        (flat.view(3, 2, 4), [2, 2, 2]),
        (flat.view(1, 3, 2, 4), [2, 2, 2]),
        ([flat, flat[:2]], [6, 2]),
        ((flat.view(3, 2, 4),), [6]),
    ):
        assert [len(item) for item in items_of(BaseModelOutputWithPooling(pooler_output=pooled))] == wanted


def test_layouts_travel_with_the_features() -> None:
    output = BaseModelOutputWithPooling()
    assert tagged(output) is None
    tag(output, [grid(2)])
    assert len(tagged(output)) == 1
    assert list(output) == []


def test_placeholders_are_found_by_id_or_by_their_embedding() -> None:
    embedding = nn.Embedding(9, 3)
    ids = torch.tensor([[1, 7, 7, 8], [8, 2, 7, 3]])
    by_id = placeholder_masks({"input_ids": ids}, {"image": 7, "video": 8}, embedding)
    by_embedding = placeholder_masks({"inputs_embeds": embedding(ids)}, {"image": 7, "video": 8}, embedding)
    for found in (by_id, by_embedding):
        assert torch.equal(found["image"], ids == 7)
        assert torch.equal(found["video"], ids == 8)
    shared = placeholder_masks({"input_ids": ids}, {"image": 7, "video": 7}, embedding)
    assert list(shared) == ["image"]
