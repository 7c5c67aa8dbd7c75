"""VoCo: what is hidden, by the worked example and by the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.compression.voco import VoCo
from mmfast.token_pruning.compression_base import compressed_mask, own_parts
from mmfast.tokens import Layout

WORKED = [
    "1...........",
    "11..........",
    "111.........",
    "1111........",
    "11111.......",
    "111111......",
    "1111111.....",
    "......11....",
    "......111...",
    "......1111..",
    "......11111.",
    "......111111",
]


def mask_of(roles: str, method: VoCo) -> torch.Tensor:
    """Write the mask of a prompt out; digits are the visual tokens of images, b, n and t text, c compression."""
    places = {kind: [i for i, role in enumerate(roles) if role == kind] for kind in set(roles)}
    media = [torch.tensor(places[kind]) for kind in sorted(places) if kind.isdigit()]
    text = torch.tensor([i for i, role in enumerate(roles) if role.isalpha()], dtype=torch.int64)
    marked = torch.tensor(places.get("c", []), dtype=torch.int64)
    real = torch.tensor([role != "." for role in roles])
    return compressed_mask(real, method.hidden(media, text, marked))


def test_the_worked_example() -> None:
    mask = mask_of("b1111ncntttt", VoCo(hide_prefix="all"))
    assert ["".join("1" if seen else "." for seen in row) for row in mask.tolist()] == WORKED


def test_the_paper_hides_the_image_alone() -> None:
    mask = mask_of("b1111ncntttt", VoCo(hide_prefix="visual"))
    assert mask[6].tolist() == [True] * 7 + [False] * 5
    assert mask[8].tolist() == [True, *[False] * 4, *[True] * 4, *[False] * 3]


@pytest.mark.parametrize("prefix", ["all", "visual"])
@pytest.mark.parametrize("seed", range(40))
def test_the_mask_against_its_definition(seed: int, prefix: str) -> None:
    """Each image: its tokens, text, compression tokens (or none), text."""
    draw = np.random.default_rng(seed)
    roles = "." * int(draw.integers(4)) + "b"
    for number in range(int(draw.integers(4))):
        visual, between, count, after = (int(value) for value in draw.integers([1, 0, 0, 0], [5, 3, 4, 3]))
        roles += str(number) * visual + "n" * between + "c" * count + "t" * after
    mask = mask_of(roles, VoCo(hide_prefix=prefix))  # type: ignore[arg-type]
    # An image without compression tokens is read into those of the next one, text apart.
    groups: list[tuple[set[int], int, int]] = []
    waiting: set[int] = set()
    for place, role in enumerate(roles):
        if role.isdigit():
            waiting.add(place)
        if role == "c" and waiting:
            end = next(i for i in range(place, len(roles) + 1) if i == len(roles) or roles[i] != "c")
            groups.append((waiting, place, end))
            waiting = set()
    for row in range(len(roles)):
        for column in range(len(roles)):
            gone = False
            for turn, (images, first, end) in enumerate(groups):
                begin = 0 if turn == 0 else min(images)
                covered = column in images if prefix == "visual" else begin <= column < first and roles[column] != "c"
                gone = gone or (row >= end and covered)
            assert bool(mask[row, column]) == (column <= row and roles[column] != "." and not gone)


@pytest.mark.parametrize("roles", ["b11cct", "b11cccct22cct", "b11ccct22t", "b11t"])
def test_another_number_of_tokens_is_refused_where_one_is_told(roles: str) -> None:
    mask_of(roles, VoCo())
    with pytest.raises(ValueError, match="tokens=3, but an image of the prompt has"):
        mask_of(roles, VoCo(tokens=3))
    mask_of("b11ccct22ccct", VoCo(tokens=3))


@pytest.mark.parametrize(("options", "message"), [({"tokens": 0}, "tokens=0"), ({"tokens": True}, "tokens=True"),
                                                  ({"hide_prefix": "text"}, "hide_prefix='text'")])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VoCo(**options)  # type: ignore[arg-type]


def test_the_registry_says_what_it_does() -> None:
    info = get("voco")
    assert (info.stage, info.kind, info.action, info.training_free) == ("in_llm", "Compressor", "compresses", False)


@pytest.mark.parametrize("layouts", [[Layout.grid(16, 16)], [Layout.grid(5, 9)], [Layout.grid(4, 4)] * 3], ids=len)
def test_each_level_of_parts_covers_everything_once(layouts: list[Layout]) -> None:
    parts = own_parts(layouts, 16)
    assert parts.shape == (16, sum(len(layout) for layout in layouts))
    for first, last in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16)):
        assert parts[first:last].sum(dim=0).tolist() == [1] * parts.shape[1]
    # What a token has does not depend on how many follow.
    for count in range(1, 17):
        assert torch.equal(own_parts(layouts, count), parts[:count])
    sizes = parts[8:].sum(dim=1)
    assert sizes.min() > 0
    assert sizes.max() <= 2.5 * sizes.min()


def test_parts_of_a_picture_are_square_and_of_a_clip_follow_each_other() -> None:
    quarter = own_parts([Layout.grid(4, 4)], 8)[4].view(4, 4)
    assert quarter.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    clip = own_parts([Layout.grid(2, 2, frames=4, modality="video")], 8)[4:].view(4, 4, 4)
    assert clip.all(dim=2).int().tolist() == torch.eye(4).int().tolist()


def test_the_parts_of_few_tokens_may_be_empty() -> None:
    parts = own_parts([Layout.grid(1, 2)], 8)
    assert parts[4:].any(dim=1).sum() == 2
    assert parts[:2].all()
