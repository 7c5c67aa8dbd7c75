"""SparseMM: heads by a file of scores, and what is wrong with such files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.sparsemm import capped_shares
from mmfast.registry import get

SPARSE = get("sparsemm").method


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Tensor], str]:
    def save(scores: Tensor, name: str = "scores") -> str:
        path = tmp_path / "heads.safetensors"
        save_file({name: scores.contiguous()}, path)
        return str(path)

    return save


def prompt(layer: int = 0, depth: int = 2, length: int = 40, heads: int = 4, groups: int = 2) -> Entries:
    generator = torch.Generator().manual_seed(layer)
    keys, values = torch.randn(2, groups, length, 4, generator=generator)
    return Entries.of(keys, values, torch.randn(heads, length, 4, generator=generator), layer=layer, depth=depth)


def test_budgets_by_hand(saved: Callable[[Tensor], str]) -> None:
    path = saved(torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 0.0, 4.0]]))
    # 10 beside the window for each of four heads, one of them for each: 36 by the shares 2, 4, 6, 4 of 16.
    expected = [[5.5, 10.0], [14.5, 10.0]]
    official = SPARSE(keep=14, window=4, head_scores=path, compat="official")
    assert official.head_budgets(10, (2, 4), 2).tolist() == [[round(value) for value in row] for row in expected]
    found = []
    method = SPARSE(keep=14, window=4, head_scores=path)
    for layer in range(2):
        kept = method(prompt(layer)).kept
        assert kept[:, -4:].all()
        assert int(kept.sum()) == 2 * method.layer_count(40, layer, 2)
        found.append([count - 4 for count in kept.sum(dim=-1).tolist()])
    assert found == [[6, 10], [14, 10]]


def test_what_a_head_cannot_hold_goes_to_the_others(saved: Callable[[Tensor], str]) -> None:
    path = saved(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    shapes = {"heads": 4, "groups": 4}
    method = SPARSE(keep=12, window=2, head_scores=path, min_share=0.0)
    counts = [method(prompt(layer, **shapes)).kept.sum(dim=-1).tolist() for layer in range(2)]
    # 80 places beside the windows, all for one head, which takes 38; the others of its layer get 14 each.
    assert counts == [[40, 16, 16, 16], [2, 2, 2, 2]]
    official = SPARSE(keep=12, window=2, head_scores=path, min_share=0.0, compat="official")
    counts = [official(prompt(layer, **shapes)).kept.sum(dim=-1).tolist() for layer in range(2)]
    assert counts == [[40, 2, 2, 2], [2, 2, 2, 2]]


def test_without_a_file_heads_are_alike() -> None:
    entries = prompt()
    kept = SPARSE(keep=12, window=2)(entries).kept
    assert torch.equal(kept, get("snapkv").method(keep=12, window=2)(entries).kept)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 9), st.integers(0, 100))
def test_shares_add_up_within_their_bounds(weights: list[int], least: int, room: int, part: int) -> None:
    most = least + room
    total = least * len(weights) + room * len(weights) * part // 100
    found = capped_shares(total, [float(weight) for weight in weights], least, most)
    assert sum(found) == total
    assert all(least <= value <= most for value in found)
    assert all(a >= b - 1 for a, b, x, y in _pairs(found, weights) if x >= y)


def _pairs(found: list[int], weights: list[int]) -> list[tuple[int, int, int, int]]:
    both = list(zip(found, weights, strict=True))
    return [(a, b, x, y) for a, x in both for b, y in both]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(3, 4), "scores of 3 layers with 4 query heads each, but this model has 2 layers"),
        (torch.ones(2, 8), "with 8 query heads each, but this model has 2 layers with 4"),
        (torch.ones(4), "of shape"),
        (torch.zeros(2, 4), "not all zero"),
        (-torch.ones(2, 4), "not negative"),
        (torch.full((2, 4), torch.nan), "finite"),
    ],
)
@pytest.mark.parametrize("compat", [None, "official"])
def test_scores_that_do_not_fit_are_refused(
    saved: Callable[[Tensor], str], scores: Tensor, message: str, compat: str | None
) -> None:
    method = SPARSE(keep=12, window=2, head_scores=saved(scores), compat=compat)
    with pytest.raises(ValueError, match=message):
        method(prompt())


def test_files_that_are_something_else_are_refused(saved: Callable[[Tensor], str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a tensor 'scores'"):
        SPARSE(keep=12, head_scores=saved(torch.ones(2, 4), "weights"))(prompt())
    text = tmp_path / "heads.txt"
    text.write_text("1 2 3")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        SPARSE(keep=12, head_scores=str(text))(prompt())


@pytest.mark.parametrize(
    "options",
    [
        {"head_scores": "nowhere"},
        {"head_scores": 3},
        {"min_share": 2},
        {"compat": "paper"},
        {"entries": "visual", "compat": "official"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SPARSE(**options)
