"""InfiniPot-V: what the vectors do not touch: frames of unequal size, images, tight budgets."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.infinipot_v import temporal_likeness
from mmfast.registry import get

INFINIPOT = get("infinipot_v").method


def prompt(sizes: list[int], media: list[int] | None = None, heads: int = 2) -> Entries:
    """Make frames of the given sizes between two text tokens; frames count inside their image or video."""
    owner = media or [0] * len(sizes)
    number = [owner[:place].count(item) for place, item in enumerate(owner)]
    repeats = torch.tensor(sizes)
    end = torch.tensor([-1])
    frame = torch.cat([end, torch.tensor(number).repeat_interleave(repeats), end])
    which = torch.cat([end, torch.tensor(owner).repeat_interleave(repeats), end])
    keys, values = torch.randn(2, heads, len(frame), 4, generator=torch.Generator().manual_seed(sum(sizes)))
    return Entries.of(keys, values, visual=which >= 0, media=which, frame=frame)


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize(
    ("sizes", "media"),
    [([6, 6, 6, 6], None), ([1] * 9, None), ([9], None), ([5, 3, 7, 1], None), ([4, 4, 6, 2, 2], [0, 0, 1, 2, 2])],
)
def test_budget_is_exact_and_text_stays(sizes: list[int], media: list[int] | None, pooling: bool) -> None:
    found = prompt(sizes, media)
    for kept in range(1, sum(sizes)):
        mask = INFINIPOT(keep=kept, pooling=pooling)(found).kept
        assert mask[:, found.visual].sum(dim=-1).tolist() == [kept, kept]
        assert bool(mask[:, ~found.visual].all())


def test_an_image_is_judged_by_norms_alone() -> None:
    found = prompt([10], heads=1)
    best = found.values[0, 1:11].norm(dim=-1).topk(4).indices + 1
    assert INFINIPOT(keep=4)(found).kept[0].nonzero().squeeze(-1).tolist() == sorted([0, *best.tolist(), 11])


def test_media_share_the_budget_by_size() -> None:
    found = prompt([8, 4], [0, 1])
    mask = INFINIPOT(keep=6)(found).kept
    assert mask[:, found.media == 0].sum(dim=-1).tolist() == [4, 4]
    assert mask[:, found.media == 1].sum(dim=-1).tolist() == [2, 2]


def test_newest_frames_and_what_changed_stay() -> None:
    frame = torch.arange(4).repeat_interleave(2)
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).repeat(4, 1)
    keys[2] = torch.tensor([0.0, 1.0])
    found = Entries.of(keys[None], torch.zeros(1, 8, 2), visual=frame >= 0, frame=frame)
    assert INFINIPOT(keep=3, temporal=1.0)(found).kept[0].nonzero().squeeze(-1).tolist() == [2, 6, 7]


def test_where_no_frame_fits_the_newest_is_compared_with() -> None:
    frame = torch.arange(4).repeat_interleave(2)
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).repeat(4, 1)
    keys[3] = torch.tensor([-1.0, 0.0])
    found = Entries.of(keys[None], torch.zeros(1, 8, 2), visual=frame >= 0, frame=frame)
    assert INFINIPOT(keep=1, temporal=1.0)(found).kept[0].nonzero().squeeze(-1).tolist() == [3]


def test_places_without_a_counterpart_are_new() -> None:
    keys = torch.ones(1, 3, 2)
    assert temporal_likeness(keys, torch.tensor([0, 0, 1]), 1)[0].tolist() == pytest.approx([1.0, 0.0, 1.0])


def test_rows_that_do_not_fit_a_frame_are_chosen_anew() -> None:
    found = prompt([12, 12, 12])
    first, second = (INFINIPOT(keep=9, pooling=True, rows=rows)(found).kept for rows in (5, 3))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("field", "value"), [("temporal", 1.5), ("recent", -0.1), ("recent", True), ("rows", -1), ("entries", "all")]
)
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        INFINIPOT(**{field: value})
