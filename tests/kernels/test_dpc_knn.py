"""Density peaks: by hand and naively, and Triton against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.dpc_knn import Peaks, dpc_knn, reference
from mmfast.kernels.rows import row_blocks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(features: Tensor, clusters: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Row by row, from the definition."""
    total = len(features)
    apart = [
        [math.dist(a, b) / math.sqrt(features.shape[1]) for b in features.double().tolist()]
        for a in features.double().tolist()
    ]
    density = []
    for row in apart:
        near = sorted(row)[: min(neighbours, total)]
        density.append(-sum(value * value for value in near) / len(near))
    score = []
    for row in range(total):
        denser = [o for o in range(total) if (-density[o], o) < (-density[row], row)]
        away = min((apart[row][other] for other in denser), default=max(map(max, apart)))
        score.append(density[row] + (math.log(away) if away else -math.inf))
    centres = sorted(range(total), key=lambda row: (-score[row], row))[:clusters]
    owner = [min(range(len(centres)), key=lambda cluster: apart[row][centres[cluster]]) for row in range(total)]
    for cluster, centre in enumerate(centres):
        owner[centre] = cluster
    return centres, owner


@pytest.mark.parametrize("neighbours", [3, 6, 40])
def test_reference_matches_the_definition(neighbours: int) -> None:
    features, counts = drawn(4, 25, 5), [25, 0, 1, 11]
    with use("torch"):
        found = dpc_knn(features, 6, neighbours=neighbours, counts=torch.tensor(counts))
    for row, count in enumerate(counts):
        centres, owner = naive(features[row, :count], 6, neighbours)
        assert found.centres[row].tolist() == (centres + [-1] * 6)[:6]
        assert found.owner[row].tolist() == owner + [-1] * (25 - count)
        assert found.score[row, count:].isneginf().all()


def test_as_many_neighbours_as_clusters_unless_told() -> None:
    with use("torch"):
        found, expected = dpc_knn(drawn(1, 25, 5), 6), dpc_knn(drawn(1, 25, 5), 6, neighbours=6)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_lower_index_counts_as_denser() -> None:
    # Two pairs, each of equal densities: were both of a pair the densest, the far pair would have no centre.
    features = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    with use("torch"):
        found = dpc_knn(features, 2)
    assert found.centres.tolist() == [[0, 2]]
    assert found.owner.tolist() == [[0, 0, 1, 1]]


def test_distances_need_not_be_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, counts = drawn(2, 25, 5), torch.tensor([25, 11])
    with use("torch"):
        whole = dpc_knn(features, 6, counts=counts)
        # A few rows at a time.
        monkeypatch.setattr(reference, "MATRIX_LIMIT", 10)
        monkeypatch.setattr(reference, "row_blocks", lambda rows, width: row_blocks(rows, width, 4 * width))
        parts = dpc_knn(features, 6, counts=counts)
    assert parts.centres.equal(whole.centres)
    assert parts.owner.equal(whole.owner)
    torch.testing.assert_close(parts.score, whole.score, rtol=1e-5, atol=1e-5)


def test_what_all_rows_share_does_not_swallow_the_distances() -> None:
    features = drawn(1, 30, 4)
    with use("torch"):
        assert dpc_knn(features.double().add(4096.0).float(), 5).owner.equal(
            dpc_knn(features.double().add(4096.0).float() - 4096.0, 5).owner
        )


def test_nothing_to_cluster() -> None:
    found = dpc_knn(torch.zeros(2, 0, 3), 2)
    assert found.centres.tolist() == [[-1, -1]] * 2
    assert found.owner.shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(3, 2)}, ValueError, "features has shape"),
        ({"clusters": 0}, ValueError, "clusters=0 must be a whole number of at least 1"),
        ({"neighbours": 0}, ValueError, "neighbours=0 must be a whole number of at least 1"),
        ({"counts": torch.tensor([4])}, ValueError, r"counts=\[4\] must lie in 0..3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dpc_knn(**({"features": torch.zeros(1, 3, 2), "clusters": 1} | arguments))  # type: ignore[arg-type]


def same(features: Tensor, clusters: int, **options: object) -> Peaks:
    with use("torch"):
        expected = dpc_knn(features, clusters, **options)  # type: ignore[arg-type]
    with use("triton"):
        found = dpc_knn(features, clusters, **options)  # type: ignore[arg-type]
    assert found.centres.equal(expected.centres)
    assert found.owner.equal(expected.owner)
    torch.testing.assert_close(found.score, expected.score, rtol=2e-5, atol=2e-5)
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 60, 100])
def test_triton_clusters_the_same(dtype: torch.dtype, width: int, device: torch.device) -> None:
    features = drawn(63, width, 3).to(device, dtype).permute(2, 0, 1).clone(memory_format=torch.preserve_format)
    assert width == 1 or not features.is_contiguous()
    features[2, 5:] = torch.nan
    same(features, 7, neighbours=4, counts=torch.tensor([63, 0, 5], device=device))


@pytest.mark.interpreter
def test_triton_breaks_ties_alike(device: torch.device) -> None:
    # On a grid of whole numbers, in as many dimensions as a power of four, distances are exact.
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)).to(device)
    grid = torch.cat([grid, torch.zeros(36, 2, device=device)], dim=1)
    for neighbours in (1, 2, 5):
        same(grid[None], 6, neighbours=neighbours)
    same(torch.zeros(2, 9, 4, device=device), 3)
    same(torch.tensor([[[0.0], [1.0], [10.0], [11.0]]], device=device), 2)


@pytest.mark.interpreter
def test_triton_need_not_hold_all_distances(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels.dpc_knn import triton

    monkeypatch.setattr(triton, "MATRIX_LIMIT", 10)
    monkeypatch.setattr(triton, "_HELD", 2 * 41 * 17)
    same(drawn(2, 41, 6).to(device), 5, counts=torch.tensor([41, 20], device=device))


@pytest.mark.interpreter
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 40), width=st.integers(2, 9), clusters=st.integers(1, 8))
def test_triton_takes_any_shape(total: int, width: int, clusters: int, device: torch.device) -> None:
    same(drawn(2, total, width, seed=total).to(device), clusters)


@pytest.mark.gpu
def test_sizes_of_real_images() -> None:
    same(drawn(4, 576, 1024).cuda(), 40, neighbours=7, counts=torch.tensor([576, 500, 64, 1], device="cuda"))
