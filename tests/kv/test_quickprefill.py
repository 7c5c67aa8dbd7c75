"""QuickPrefill: groups of frames, which the vectors have one of."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.registry import get

QUICKPREFILL = get("quickprefill").method


def video(norms: list[float], frame: list[int], media: list[int] | None = None) -> Entries:
    keys = torch.tensor(norms)[None, :, None]
    frames = torch.tensor(frame)
    which = frames.clamp_max(0) if media is None else torch.tensor(media)
    return Entries.of(keys, torch.zeros_like(keys), visual=frames >= 0, frame=frames, media=which)


def test_each_group_keeps_its_share() -> None:
    found = video([1, 2, 3, 4, 9, 8, 7, 6, 5], [0, 0, 1, 1, 2, 2, 3, 3, -1])
    kept = QUICKPREFILL(keep=0.5, group=2)(found).kept
    assert kept.tolist() == [True, True, False, False, False, False, True, True, True]


def test_images_are_groups_of_their_own() -> None:
    found = video([1, 2, 9, 8], [0, 0, 0, 0], [0, 0, 1, 1])
    assert QUICKPREFILL(keep=2)(found).kept.tolist() == [True, False, False, True]


def test_heads_count_together() -> None:
    keys = torch.tensor([[[3.0], [0.0]], [[0.0], [2.0]]])
    found = Entries.of(keys, keys, visual=torch.ones(2, dtype=torch.bool))
    assert QUICKPREFILL(keep=1)(found).kept.tolist() == [False, True]


@pytest.mark.parametrize("kept", range(1, 11))
def test_budget_is_exact_in_unequal_groups(kept: int) -> None:
    found = video([1.0] * 11, [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4])
    assert int(QUICKPREFILL(keep=kept, group=2)(found).kept.sum()) == kept


@pytest.mark.parametrize(("field", "value"), [("group", 0), ("group", True), ("entries", "all")])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        QUICKPREFILL(**{field: value})
