"""Expected attention: cases whose answer is known, partial rotation, and short prompts."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Rotation, rotate
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from support.entries import rotary

EXPECTED = get("expected_attention").method


def prompt(
    total: int, width: int = 8, rotated: int = 8, scaling: float | None = None, visual: slice = slice(0)
) -> Entries:
    """Make a prompt in which every query is the same before it is rotated."""
    drawn = torch.Generator().manual_seed(total)
    keys, values = torch.randn(2, 1, total, width, generator=drawn)
    rotation = rotary(total, rotated, 100.0)
    query = torch.randn(2, 1, width, generator=drawn).expand(-1, total, -1)
    query = rotate(query, rotation.cos, rotation.sin)
    seen = torch.zeros(total, dtype=torch.bool)
    seen[visual] = True
    view = AttentionView(query, keys, values, scaling=scaling)
    return Entries.of(keys, values, visual=seen, attention=view, rotation=rotation)


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_a_query_that_never_changes_is_foreseen(rotated: int, scaling: float | None) -> None:
    found = prompt(9, rotated=rotated, scaling=scaling)
    ahead = rotate(found.rotation.undo(found.view.query)[:, :1], *found.rotation.at(torch.tensor([9])))
    weights = (ahead[:, 0] @ found.keys[0].T * (scaling or 8**-0.5)).softmax(dim=-1).mean(dim=0)
    score = EXPECTED(future=1, sinks=0, value_norm=False).score(found, 4)
    assert torch.allclose(score[0], weights, atol=1e-5)


def test_rotations_that_also_scale_are_undone_and_done_again() -> None:
    plain = prompt(9)
    table = plain.rotation
    scaled = Rotation(2 * table.cos, 2 * table.sin, lambda places: tuple(2 * part for part in table.at(places)))
    view = AttentionView(2 * plain.view.query, plain.keys, plain.values)
    found = Entries.of(plain.keys, plain.values, attention=view, rotation=scaled)
    twice = Entries.of(2 * plain.keys, plain.values, attention=plain.view, rotation=table)
    method = EXPECTED(future=3, sinks=0)
    assert torch.allclose(method.score(found, 4), method.score(twice, 4), atol=1e-5)


@pytest.mark.parametrize("total", [2, 3, 4, 5])
def test_prompts_shorter_than_the_sinks_are_cut_to_size(total: int) -> None:
    found = EXPECTED(keep=total - 1)(prompt(total))
    assert found.counts == [total - 1]
    assert bool(found.kept[0, : total - 1].all())


def test_sinks_in_the_image_never_cost_text() -> None:
    found = prompt(10, visual=slice(1, 8))
    for kept in range(1, 7):
        mask = EXPECTED(keep=kept, entries="visual")(found).kept
        assert bool(mask[:, ~found.visual].all())
        assert int(mask[:, found.visual].sum()) == kept


@pytest.mark.parametrize(("field", "value"), [("future", 0), ("sinks", -1), ("epsilon", -0.5), ("epsilon", True)])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        EXPECTED(**{field: value})
