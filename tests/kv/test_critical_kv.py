"""CriticalKV: other scorers, text that stays, and contributions by hand."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.registry import get

CRITICAL = get("critical_kv").method


def entries(values: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, **others: object) -> Entries:
    return Entries.of(keys, values, output_weight=weight, **others)


def test_contributions_are_those_of_the_projected_values() -> None:
    drawn = torch.Generator().manual_seed(0)
    values, weight = torch.randn(2, 5, 3, generator=drawn), torch.randn(7, 12, generator=drawn)
    found = CRITICAL().contributions(entries(values, values, weight))
    for group in range(2):
        for place in range(5):
            sizes = []
            for head in (2 * group, 2 * group + 1):
                alone = torch.zeros(12)
                alone[3 * head : 3 * head + 3] = values[group, place]
                sizes.append(float((weight @ alone).abs().sum()))
            assert float(found[group, place]) == pytest.approx(sum(sizes) / 2, rel=1e-5)


def test_second_half_goes_to_contributions_also_for_negative_scores() -> None:
    # By norm of keys 0 is best; of the others 3 writes most, though 1 and 2 have better scores.
    keys, values = (
        torch.tensor([[[1.0], [2.0], [3.0], [3.5], [9.0]]]),
        torch.tensor([[[1.0], [1.0], [1.0], [9.0], [9.0]]]),
    )
    found = CRITICAL(keep=2, scorer="knorm")(entries(values, keys, torch.ones(1, 1)))
    assert found.kept.tolist() == [[True, False, False, True, False]]


def test_first_stage_alone_is_the_scorer_and_none_of_it_is_not() -> None:
    drawn = torch.Generator().manual_seed(1)
    prompt = entries(*torch.randn(2, 2, 30, 4, generator=drawn), torch.randn(8, 8, generator=drawn))
    whole = CRITICAL(keep=10, scorer="keydiff", first_stage=1.0)(prompt).kept
    assert torch.equal(whole, get("keydiff").method(keep=10)(prompt).kept)
    assert not torch.equal(CRITICAL(keep=10, scorer="keydiff", first_stage=0.0)(prompt).kept, whole)


def test_text_neither_goes_nor_uses_up_the_first_stage() -> None:
    keys = torch.tensor([[[0.1], [1.0], [2.0], [3.0], [0.2]]])
    visual = torch.tensor([False, True, True, True, False])
    prompt = entries(torch.tensor([[[1.0], [0.0], [1.0], [1.0], [1.0]]]), keys, torch.ones(1, 1), visual=visual)
    found = CRITICAL(keep=2, scorer="knorm", entries="visual")(prompt)
    assert found.kept.tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize("window", [1, 4, 8, 20])
def test_a_window_in_the_image_never_costs_text(window: int) -> None:
    drawn = torch.Generator().manual_seed(2)
    keys, query = torch.randn(2, 1, 12, 4, generator=drawn)
    visual = torch.zeros(12, dtype=torch.bool)
    visual[3:11] = True
    prompt = entries(keys, keys, torch.ones(2, 4), query=query, visual=visual)
    for kept in range(1, 8):
        mask = CRITICAL(keep=kept, scorer=f"snapkv(window={window})", entries="visual")(prompt).kept
        assert bool(mask[:, ~visual].all())
        assert int(mask[:, visual].sum()) == kept


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("divprune", "scorer='divprune' must name"),
        ("critical_kv", "scorer='critical_kv' must name another"),
        ("razor_attention", "scorer='razor_attention' must name"),
        (3, "scorer=3 must name"),
        ("snapkv + kv_merging", "is no method"),
        ("snapkw", "did you mean snapkv"),
    ],
)
def test_what_does_not_score_entries_is_refused(scorer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRITICAL(scorer=scorer)


def test_scorers_of_frames_need_text_to_stay() -> None:
    with pytest.raises(ValueError, match="entries='all' must be 'visual'"):
        CRITICAL(scorer="quickprefill")
    assert CRITICAL(scorer="quickprefill", entries="visual").base.group == 16


@pytest.mark.parametrize(("field", "value"), [("first_stage", 2), ("first_stage", True), ("epsilon", -1.0)])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        CRITICAL(**{field: value})
