"""Attention on demand against the whole matrix, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfast.token_pruning import attention
from mmfast.token_pruning.attention import AttentionView
from support.attention import DenseAttention

LENGTH, WIDTH = 7, 8
CLOSE = 1e-6


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def visibility(length: int, past: int, kind: str) -> Tensor:
    """``[n, past + n]`` bool; the masks that are given hide some columns and show some that come later."""
    visible = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    if kind != "none":
        visible[:, 1] = False
        visible[0, -1] = True
        visible[range(length), range(past, past + length)] = True
    return visible


def dense(view: AttentionView, visible: Tensor, temperature: float = 1.0) -> Tensor:
    """The textbook: every row and column, ``[H, n, past + n]``."""
    key = view.key.double().repeat_interleave(view.heads // view.key.shape[0], dim=0)
    scaling = view.query.shape[-1] ** -0.5 if view.scaling is None else view.scaling
    logits = view.query.double() @ key.transpose(-1, -2) * scaling
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    return (logits.masked_fill(~visible, -torch.inf) / temperature).softmax(dim=-1)


def example(
    groups: int = 2, past: int = 0, mask: str = "none", softcap: float | None = None, **given: Any
) -> tuple[AttentionView, Tensor]:
    """A view of four heads, and what each row may see."""
    visible = visibility(LENGTH, past, mask)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    view = AttentionView(
        3.0 * random(4, LENGTH, WIDTH, seed=0),
        random(groups, past + LENGTH, WIDTH, seed=1),
        softcap=softcap,
        mask={"none": None, "bool": visible, "additive": additive}[mask],
        **given,
    )
    return view, visible


everything = pytest.mark.parametrize(
    ("groups", "past", "mask", "softcap"),
    [
        (groups, past, mask, softcap)
        for groups in (4, 2, 1)
        for past in (0, 3)
        for mask in ("none", "bool", "additive")
        for softcap in (None, 1.5)
    ],
)


@everything
def test_rows(groups: int, past: int, mask: str, softcap: float | None) -> None:
    view, visible = example(groups, past, mask, softcap)
    rows = torch.tensor([6, 0, 3])
    found = view.rows(rows)
    assert (view.length, view.heads, view.past) == (LENGTH, 4, past)
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, LENGTH)
    whole = dense(view, visible)
    assert (found - whole[:, rows, past:]).abs().max() < CLOSE
    # What cached tokens get is missing from the prompt's columns, not shared out among them.
    assert (found.sum(-1) - (1 - whole[:, rows, :past].sum(-1))).abs().max() < CLOSE
    hidden = ~visible[rows, past:]
    assert bool((found[:, hidden] == 0).all())


@everything
def test_logits(groups: int, past: int, mask: str, softcap: float | None) -> None:
    view, visible = example(groups, past, mask, softcap)
    rows = torch.tensor([2, 5])
    plain = view.logits(rows, masked=False)
    assert plain.shape == (4, 2, past + LENGTH)
    assert bool(plain.isfinite().all())
    masked = view.logits(rows)
    seen = visible[rows].expand_as(masked)
    assert torch.allclose(masked[seen], plain[seen], atol=CLOSE)
    assert bool((masked[~seen] <= torch.finfo(torch.float32).min / 2).all())
    assert (masked.softmax(-1) - dense(view, visible)[:, rows]).abs().max() < CLOSE


@everything
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_column_sums(groups: int, past: int, mask: str, softcap: float | None, temperature: float) -> None:
    view, visible = example(groups, past, mask, softcap)
    whole = dense(view, visible, temperature)[..., past:]
    weights = torch.tensor([0.0, 1.0, 0.5, 0.0, -2.0, 1.0, 0.25])
    per_head = torch.stack([weights, weights.flip(0), torch.zeros(LENGTH), torch.ones(LENGTH)])

    def column_sums(given: Tensor, heads: Any) -> Tensor:
        found = view.column_sums(given, heads=heads, temperature=temperature)
        assert found.dtype == torch.float32
        return found

    wanted = torch.einsum("n,hnk->hk", weights.double(), whole)
    assert (column_sums(weights, "each") - wanted).abs().max() < 1e-5
    assert (column_sums(weights, "mean") - wanted.mean(0)).abs().max() < 1e-5
    assert (column_sums(weights, "max") - weights.double() @ whole.amax(0)).abs().max() < 1e-5
    own = torch.einsum("hn,hnk->hk", per_head.double(), whole)
    assert (column_sums(per_head, "each") - own).abs().max() < 1e-5


@everything
def test_what_methods_ask_of_columns(groups: int, past: int, mask: str, softcap: float | None) -> None:
    view, visible = example(groups, past, mask, softcap, silent=torch.arange(LENGTH) == 3)
    whole = dense(view, visible)[..., past:].masked_fill((torch.arange(LENGTH) == 3)[:, None], 0.0)
    rows, columns = torch.tensor([6, 3, 2]), torch.arange(LENGTH) % 2 == 0
    total, largest = view.column_sums_and_peaks(rows)
    mean = whole.mean(0)[rows]
    assert (total - mean.sum(0)).abs().max() < 1e-5
    assert (largest - mean.amax(0)).abs().max() < CLOSE
    assert (view.mass(columns) - whole[..., columns].sum(-1)).abs().max() < CLOSE


@pytest.mark.parametrize("elements", [1, 4 * (LENGTH + 3) * 2, 4 * (LENGTH + 3) * 3, 1 << 22])
def test_blocks_of_any_size_give_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view, visible = example(past=3, mask="bool")
    monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", elements)
    rows = torch.tensor([6, 4, 2, 0, 1])
    parts = list(view.blocks(rows, temperature=0.5))
    assert max(block.shape[1] for _, block in parts) <= max(1, elements // (4 * (LENGTH + 3)))
    places = torch.cat([place for place, _ in parts])
    assert places.tolist() == [0, 1, 2, 3, 4]
    found = torch.cat([block for _, block in parts], dim=1)
    assert (found - dense(view, visible, 0.5)[:, rows, 3:]).abs().max() < CLOSE
    weights = torch.linspace(0.1, 1.0, LENGTH)
    wanted = torch.einsum("n,hnk->k", weights.double(), dense(view, visible)[..., 3:]) / 4
    assert (view.column_sums(weights) - wanted).abs().max() < 1e-5


def test_no_rows_cost_nothing() -> None:
    view, _ = example()
    assert list(view.blocks(torch.tensor([], dtype=torch.int64))) == []
    assert view.column_sums(torch.zeros(LENGTH)).tolist() == [0.0] * LENGTH
    assert view.column_sums(torch.zeros(4, LENGTH), heads="each").shape == (4, LENGTH)


def test_scaling_is_taken_where_it_is_given() -> None:
    view, visible = example(scaling=0.7)
    rows = torch.arange(LENGTH)
    assert (view.rows(rows) - dense(view, visible)).abs().max() < CLOSE
    assert (view.rows(rows) - example()[0].rows(rows)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    view, _ = example()
    half = AttentionView(view.query.to(dtype), view.key.to(dtype))
    same = AttentionView(view.query.to(dtype).float(), view.key.to(dtype).float())
    rows = torch.arange(LENGTH)
    assert half.rows(rows).dtype == torch.float32
    assert torch.equal(half.rows(rows), same.rows(rows))
    assert torch.equal(half.column_sums(torch.ones(LENGTH)), same.column_sums(torch.ones(LENGTH)))


@everything
def test_a_matrix_that_is_given_reads_the_same(groups: int, past: int, mask: str, softcap: float | None) -> None:
    """The stand-in of the golden checkers is the same view."""
    view, visible = example(groups, past, mask, softcap)
    stand_in = DenseAttention.of(dense(view, visible))
    rows, weights = torch.arange(LENGTH), torch.linspace(-1.0, 1.0, LENGTH)
    if past == 0:
        assert (stand_in.rows(rows) - view.rows(rows)).abs().max() < 1e-5
        for heads in ("mean", "max", "each"):
            assert (
                stand_in.column_sums(weights, heads=heads) - view.column_sums(weights, heads=heads)
            ).abs().max() < 1e-5
    by_logits = DenseAttention.of_logits(view.logits(rows))
    assert (by_logits.rows(rows, temperature=0.3)[..., -LENGTH:] - view.rows(rows, temperature=0.3)).abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return made


@pytest.mark.parametrize("heads", ["mean", "max", "each"])
def test_no_tensor_grows_with_the_square_of_the_prompt(heads: Any) -> None:
    """All rows of 4096 tokens: the matrix of one head alone would be 64 MiB."""
    length = 4096
    view = AttentionView(random(4, length, 4, seed=0), random(2, length, 4, seed=1))
    with Largest() as largest:
        total = view.column_sums(torch.ones(length), heads=heads)
    # Every row hands out one per head, or what lies between the mean and the sum of the heads.
    handed_out = float(total.double().sum()) / length
    low, high = {"mean": (1, 1), "max": (1, 4), "each": (4, 4)}[heads]
    assert low - 1e-3 <= handed_out <= high + 1e-3
    assert largest.bytes <= 4 * attention._BLOCK_ELEMENTS == 16 * 2**20
