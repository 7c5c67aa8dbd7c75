"""Greedy coverage: by hand and naively, and Triton against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.greedy_cover import greedy_cover, greedy_cover_cosine

COUNTS = torch.tensor([31, 0, 1, 12])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def naive(weights: Tensor, kept: int, saliency: Tensor | None, combine: str, barred: list[int]) -> list[int]:
    """Every gain anew for every pick."""
    exact = weights.double()
    covered = torch.zeros(weights.shape[1], dtype=torch.float64)
    picks: list[int] = []
    while len(picks) < min(kept, len(exact) - len(barred)):
        gain = (exact - covered).clamp_min(0).sum(dim=1)
        if saliency is not None:
            gain = gain * saliency if combine == "multi" else gain + saliency
        gain[picks + barred] = -torch.inf
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, exact[picks[-1]])
    return (picks + [-1] * kept)[:kept]


@pytest.mark.parametrize("combine", ["multi", "add"])
@pytest.mark.parametrize("weighed", [False, True])
def test_reference_matches_the_naive_search(combine: str, weighed: bool) -> None:
    weights, saliency, excluded = drawn(4, 31, 9), drawn(4, 31, seed=1), drawn(4, 31, seed=2) < 0.3
    own = saliency if weighed else None
    with use("torch"):
        picks = greedy_cover(weights, 14, counts=COUNTS, saliency=own, combine=combine, excluded=excluded)  # type: ignore[arg-type]
    for row, count in enumerate(COUNTS.tolist()):
        barred = excluded[row, :count].nonzero().flatten().tolist()
        rated = saliency[row, :count] if weighed else None
        assert picks[row].tolist() == naive(weights[row, :count], 14, rated, combine, barred)


@pytest.mark.parametrize("matrix_limit", [0, 4096])
def test_reference_of_cosines_matches_the_naive_search(matrix_limit: int) -> None:
    features, saliency = drawn(4, 31, 5) - 0.3, drawn(4, 31, seed=1)
    with use("torch"):
        picks = greedy_cover_cosine(features, 14, counts=COUNTS, saliency=saliency, matrix_limit=matrix_limit)
    for row, count in enumerate(COUNTS.tolist()):
        unit = torch.nn.functional.normalize(features[row, :count].double(), dim=-1)
        assert picks[row].tolist() == naive(unit @ unit.T, 14, saliency[row, :count], "multi", [])


@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_how_many_are_looked_at_at_once_changes_nothing(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast.kernels.greedy_cover.reference.CANDIDATES", candidates)
    with use("torch"):
        assert greedy_cover(drawn(1, 50, 9), 20)[0].tolist() == naive(drawn(1, 50, 9)[0], 20, None, "multi", [])


def test_a_batch_is_its_rows_one_by_one() -> None:
    features, saliency = drawn(3, 20, 6) - 0.4, drawn(3, 20, seed=1)
    features[1, 9:], saliency[1, 9:] = torch.nan, torch.inf
    with use("torch"):
        whole = greedy_cover_cosine(features, 8, counts=torch.tensor([20, 9, 4]), saliency=saliency)
        for row, count in enumerate([20, 9, 4]):
            own = features[row : row + 1, :count]
            alone = greedy_cover_cosine(own, 8, saliency=saliency[row : row + 1, :count])
            assert alone.equal(whole[row : row + 1])


def test_nothing_to_pick_from() -> None:
    assert greedy_cover(torch.zeros(2, 0, 3), 4).tolist() == [[-1] * 4] * 2
    assert greedy_cover_cosine(torch.zeros(0, 5, 3), 4).shape == (0, 4)
    assert greedy_cover(torch.zeros(1, 3, 0), 4).tolist() == [[0, 1, 2, -1]]
    everyone = torch.ones(1, 2, dtype=torch.bool)
    assert greedy_cover(torch.ones(1, 2, 2), 3, excluded=everyone).tolist() == [[-1, -1, -1]]


@pytest.mark.interpreter
def test_above_the_limit_triton_leaves_it_to_torch(device: torch.device) -> None:
    features = drawn(1, 9, 3).to(device)
    assert greedy_cover_cosine(features, 4, matrix_limit=8).equal(greedy_cover_cosine(features, 4))
    with use("triton"), pytest.raises(RuntimeError, match="more than matrix_limit=8 rows"):
        greedy_cover_cosine(features, 4, matrix_limit=8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": torch.zeros(3, 2)}, ValueError, "weights has shape"),
        ({"kept": -1}, ValueError, "kept=-1 must be"),
        ({"combine": "max"}, ValueError, "combine='max' must be one of"),
        ({"saliency": torch.zeros(1, 2)}, ValueError, "saliency has shape"),
        ({"excluded": torch.zeros(1, 2, dtype=torch.bool)}, ValueError, "excluded has shape"),
        ({"excluded": torch.zeros(1, 3)}, TypeError, "excluded is torch.float32"),
        ({"counts": torch.tensor([-1])}, ValueError, r"counts=\[-1\] must lie in 0..3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        greedy_cover(**({"weights": torch.zeros(1, 3, 2), "kept": 2} | arguments))  # type: ignore[arg-type]


def same(pick: Callable[..., Tensor], given: Tensor, kept: int, **options: object) -> None:
    with use("torch"):
        expected = pick(given, kept, **options)
    with use("triton"):
        assert pick(given, kept, **options).equal(expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("things", [1, 60, 100])
@pytest.mark.parametrize("combine", ["multi", "add", None])
def test_triton_picks_the_same(things: int, combine: str | None, device: torch.device) -> None:
    weights, counts = drawn(3, 63, things).to(device), torch.tensor([63, 0, 7], device=device)
    saliency = None if combine is None else drawn(3, 63, seed=1).to(device)
    excluded = (drawn(3, 63, seed=2) < 0.3).to(device)
    same(greedy_cover, weights, 9, counts=counts, saliency=saliency, combine=combine or "multi", excluded=excluded)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_picks_the_same_by_cosines(dtype: torch.dtype, device: torch.device) -> None:
    features = (drawn(60, 20, 2) - 0.3).to(device, dtype).permute(2, 0, 1)
    assert not features.is_contiguous()
    features = torch.stack([*features, features[0]])
    features[2, 5:] = torch.nan
    counts, saliency = torch.tensor([60, 41, 5], device=device), drawn(3, 60, seed=1).to(device)
    same(greedy_cover_cosine, features, 8, counts=counts, saliency=saliency)


@pytest.mark.interpreter
def test_triton_breaks_ties_alike(device: torch.device) -> None:
    same(greedy_cover_cosine, torch.eye(5, device=device).repeat(8, 1)[None], 12)
    same(greedy_cover, torch.zeros(2, 4, 3, device=device), 6)
    # Halves and quarters add up exactly in any order.
    weights = (torch.randint(0, 3, (2, 40, 6), generator=torch.Generator().manual_seed(0)) / 4).to(device)
    same(greedy_cover, weights, 20)
    same(greedy_cover, weights.half(), 6, saliency=torch.ones(2, 40, device=device), combine="add")


@pytest.mark.interpreter
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 40), things=st.integers(1, 9), kept=st.integers(1, 6))
def test_triton_takes_any_shape(total: int, things: int, kept: int, device: torch.device) -> None:
    # Quarters: where things are few, many rows cover equally well.
    weights = (drawn(2, total, things, seed=total) * 5).floor() / 4
    same(greedy_cover, weights.to(device), kept)


@pytest.mark.gpu
def test_sizes_of_real_images() -> None:
    features, counts = drawn(4, 576, 1024).cuda() - 0.5, torch.tensor([576, 500, 64, 1], device="cuda")
    same(greedy_cover_cosine, features, 64, counts=counts, saliency=drawn(4, 576, seed=1).cuda())
