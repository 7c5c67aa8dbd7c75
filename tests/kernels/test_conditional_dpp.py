"""Greedy choice by determinants: against determinants, and Triton against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.conditional_dpp import conditional_dpp


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def naive(features: Tensor, relevance: Tensor, kept: int) -> list[int]:
    """The determinant of every enlarged subset."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    picks: list[int] = []
    while len(picks) < min(kept, len(features)):
        rest = [row for row in range(len(features)) if row not in picks]
        picks.append(max(rest, key=lambda row: float(torch.linalg.det(kernel[[*picks, row]][:, [*picks, row]]))))
    return (picks + [-1] * kept)[:kept]


def test_reference_matches_determinants() -> None:
    features, relevance, counts = drawn(4, 17, 24), weights(4, 17), [17, 0, 1, 6]
    with use("torch"):
        picks = conditional_dpp(features, relevance, 9, counts=torch.tensor(counts))
    for row, count in enumerate(counts):
        assert picks[row].tolist() == naive(features[row, :count], relevance[row, :count], 9)


def test_a_batch_is_its_rows_one_by_one() -> None:
    features, relevance = drawn(3, 20, 30), weights(3, 20)
    features[1, 9:], relevance[1, 9:] = torch.nan, torch.inf
    with use("torch"):
        whole = conditional_dpp(features, relevance, 8, counts=torch.tensor([20, 9, 4]))
        for row, count in enumerate([20, 9, 4]):
            alone = conditional_dpp(features[row : row + 1, :count], relevance[row : row + 1, :count], 8)
            assert alone.equal(whole[row : row + 1])


def test_nothing_to_pick_from() -> None:
    assert conditional_dpp(torch.zeros(2, 0, 3), torch.zeros(2, 0), 2).tolist() == [[-1, -1]] * 2
    assert conditional_dpp(torch.zeros(2, 5, 3), torch.zeros(2, 5), 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(3, 2)}, ValueError, "features has shape"),
        ({"relevance": torch.zeros(3, 1)}, ValueError, "relevance has shape"),
        ({"kept": 1.5}, ValueError, "kept=1.5 must be"),
        ({"counts": torch.tensor([4])}, ValueError, r"counts=\[4\] must lie in 0..3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"features": torch.zeros(1, 3, 2), "relevance": torch.zeros(1, 3), "kept": 2}
    with pytest.raises(error, match=message):
        conditional_dpp(**(given | arguments))  # type: ignore[arg-type]


def same(features: Tensor, relevance: Tensor, kept: int, **options: Tensor) -> None:
    with use("torch"):
        expected = conditional_dpp(features, relevance, kept, **options)
    with use("triton"):
        assert conditional_dpp(features, relevance, kept, **options).equal(expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [60, 100])
def test_triton_picks_the_same(dtype: torch.dtype, width: int, device: torch.device) -> None:
    features, relevance = drawn(3, 63, width).to(device, dtype), weights(3, 63).to(device)
    features[1:, 20:], relevance[1:, 20:] = torch.nan, torch.inf
    same(features, relevance, 10, counts=torch.tensor([63, 0, 7], device=device))


def test_beyond_the_rank_the_lowest_rows_follow() -> None:
    """Seven directions, scaled: what is left after seven picks is rounding noise, and decides nothing."""
    features, relevance = drawn(2, 7, 30).mT @ drawn(2, 7, 40, seed=3), weights(2, 30)
    with use("torch"):
        picks = conditional_dpp(features, relevance, 33, counts=torch.tensor([30, 11]))
    for row, count in enumerate([30, 11]):
        first = naive(features[row, :count], relevance[row, :count], 7)
        rest = [other for other in range(count) if other not in first]
        assert picks[row].tolist() == first + rest + [-1] * (33 - count)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_goes_on_beyond_the_rank_alike(dtype: torch.dtype, device: torch.device) -> None:
    same(drawn(2, 20, 6, seed=2).to(device, dtype), weights(2, 20).to(device), 12)
    # Eight directions, five times each: after eight picks the determinants are zero, exactly.
    features, relevance = torch.eye(8, device=device, dtype=dtype).repeat(5, 1)[None], weights(1, 40).to(device)
    same(features, relevance, 12)
    # Everything ties.
    same(features, torch.ones(1, 40, device=device), 14)
    same(torch.zeros(1, 5, 3, device=device), weights(1, 5).to(device), 7)


@pytest.mark.interpreter
def test_triton_reads_what_is_not_contiguous(device: torch.device) -> None:
    features = drawn(70, 90, 2).to(device).permute(2, 0, 1)
    assert not features.is_contiguous()
    # More picks than the kernel reads of the factor at once.
    same(features[:1], weights(70, 1).to(device).T, 68)


@pytest.mark.interpreter
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 40), kept=st.integers(1, 6))
def test_triton_takes_any_shape(total: int, kept: int, device: torch.device) -> None:
    same(drawn(2, total, 8, seed=total).to(device), weights(2, total).to(device), kept)


@pytest.mark.gpu
def test_sizes_of_real_images() -> None:
    counts = torch.tensor([576, 500, 64, 1], device="cuda")
    same(drawn(4, 576, 1024).cuda(), weights(4, 576).cuda(), 64, counts=counts)
