"""Max-min selection: by hand and naively, and Triton against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.max_min_select import max_min_select


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(features: Tensor, kept: int) -> list[int]:
    """All distances, and every pick looked at again for every row."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
    picks = [int(distance.amin(dim=0).argmax())] if len(features) else []
    while len(picks) < min(kept, len(features)):
        rest = [row for row in range(len(features)) if row not in picks]
        picks.append(max(rest, key=lambda row: min(float(distance[row, pick]) for pick in picks)))
    return (picks + [-1] * kept)[:kept]


@pytest.mark.parametrize("matrix_limit", [0, 4096])
def test_reference_matches_the_naive_search(matrix_limit: int) -> None:
    features, counts = drawn(4, 31, 7), torch.tensor([31, 0, 1, 12])
    with use("torch"):
        picks = max_min_select(features, 14, counts=counts, matrix_limit=matrix_limit)
    assert picks.tolist() == [naive(row[:count], 14) for row, count in zip(features, counts, strict=True)]


def test_ties_go_to_the_lower_index() -> None:
    with use("torch"):
        # Three directions, twice each: every nearest neighbour is equally near, and so is what is left.
        assert max_min_select(torch.eye(3).repeat(2, 1)[None], 6).tolist() == [[0, 1, 2, 3, 4, 5]]
        assert max_min_select(torch.zeros(1, 3, 2), 3).tolist() == [[0, 1, 2]]


def test_a_batch_is_its_rows_one_by_one() -> None:
    features, counts = drawn(3, 20, 6), torch.tensor([20, 9, 4])
    features[1, 9:], features[2, 4:] = torch.nan, torch.inf
    with use("torch"):
        whole = max_min_select(features, 8, counts=counts)
        for row, count in enumerate(counts.tolist()):
            alone = max_min_select(features[row : row + 1, :count], 8)
            assert alone.equal(whole[row : row + 1])
            assert alone[:, :3].equal(max_min_select(features[row : row + 1, :count], 3))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_nothing_to_pick_from(shape: tuple[int, int, int]) -> None:
    assert max_min_select(torch.zeros(shape), 4).tolist() == [[-1] * 4] * shape[0]
    assert max_min_select(torch.zeros(2, 5, 3), 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(3, 2)}, ValueError, "features has shape"),
        ({"features": torch.zeros(1, 3, 2, dtype=torch.int64)}, TypeError, "features is torch.int64"),
        ({"kept": -1}, ValueError, "kept=-1 must be"),
        ({"kept": True}, ValueError, "kept=True must be"),
        ({"matrix_limit": -1}, ValueError, "matrix_limit=-1 must be"),
        ({"counts": torch.tensor([3, 3])}, ValueError, "counts has shape"),
        ({"counts": torch.tensor([3.0])}, TypeError, "counts is torch.float32"),
        ({"counts": torch.tensor([4])}, ValueError, r"counts=\[4\] must lie in 0..3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        max_min_select(**({"features": torch.zeros(1, 3, 2), "kept": 2} | arguments))  # type: ignore[arg-type]


def same(features: Tensor, kept: int, **options: object) -> None:
    with use("torch"):
        expected = max_min_select(features, kept, **options)  # type: ignore[arg-type]
    with use("triton"):
        assert max_min_select(features, kept, **options).equal(expected)  # type: ignore[arg-type]


@pytest.mark.interpreter
@pytest.mark.parametrize("matrix_limit", [0, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 60, 100])
def test_triton_picks_the_same(matrix_limit: int, dtype: torch.dtype, width: int, device: torch.device) -> None:
    features = drawn(3, 63, max(2, width))[..., :width].to(device, dtype)
    counts = torch.tensor([63, 0, 7], device=device)
    # In one dimension there are two directions, and almost everything is a tie.
    same(features, 9, counts=counts, matrix_limit=matrix_limit)


@pytest.mark.interpreter
@pytest.mark.parametrize("matrix_limit", [0, 4096])
def test_triton_breaks_ties_alike(matrix_limit: int, device: torch.device) -> None:
    same(torch.eye(5, device=device).repeat(3, 1)[None], 15, matrix_limit=matrix_limit)
    same(torch.zeros(2, 4, 3, device=device), 6, matrix_limit=matrix_limit)


@pytest.mark.interpreter
@pytest.mark.parametrize("matrix_limit", [0, 4096])
def test_triton_reads_what_is_not_contiguous_and_no_padding(matrix_limit: int, device: torch.device) -> None:
    features = drawn(40, 6, 2).to(device).permute(2, 0, 1)
    assert not features.is_contiguous()
    counts = torch.tensor([40, 33], dtype=torch.int32, device=device)
    same(features, 5, counts=counts, matrix_limit=matrix_limit)
    features = features.clone()
    features[1, 33:] = torch.nan
    same(features, 5, counts=counts, matrix_limit=matrix_limit)


@pytest.mark.interpreter
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 40), width=st.integers(2, 9), kept=st.integers(1, 6), limit=st.sampled_from([0, 99]))
def test_triton_takes_any_shape(total: int, width: int, kept: int, limit: int, device: torch.device) -> None:
    same(drawn(2, total, width, seed=total).to(device), kept, matrix_limit=limit)


@pytest.mark.gpu
@pytest.mark.parametrize(("total", "kept"), [(576, 64), (4097, 40)])
def test_sizes_of_real_images(total: int, kept: int) -> None:
    same(drawn(4, total, 1024).to("cuda"), kept, counts=torch.tensor([total, 500, 64, 1], device="cuda"))
