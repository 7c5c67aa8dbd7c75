"""Bipartite merging: by hand and naively, and Triton against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.bipartite_merge import Merged, average_groups, bipartite_match, bipartite_merge

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(features: Tensor, sizes: Tensor, merges: int, class_token: bool) -> tuple[Tensor, list[int], list[int]]:
    """Pairs in a list, and members of each output in another."""
    total = len(features)
    merges = min(merges, (total - class_token) // 2)
    if merges <= 0:
        return features, list(range(total)), list(range(total))
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    pairs = []
    for even in range(0, total, 2):
        odd = max(range(1, total, 2), key=lambda place: (float(unit[even] @ unit[place]), -place))
        closeness = -2.0 if class_token and even == 0 else float(unit[even] @ unit[odd])
        pairs.append((-closeness, even, odd))
    pairs.sort()
    gone, stays = pairs[:merges], [even for _, even, _ in pairs[merges:]]
    places = (sorted(stays) if class_token else stays) + list(range(1, total, 2))
    target = {even: odd for _, even, odd in gone}
    source = [places.index(target.get(row, row)) for row in range(total)]
    merged = []
    for output in range(len(places)):
        members = [row for row in range(total) if source[row] == output]
        weight = sizes[members].double()[:, None]
        merged.append((features[members].double() * weight).sum(dim=0) / weight.sum())
    return torch.stack(merged).float(), places, source


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("merges", [0, 1, 7, 99])
def test_reference_matches_the_naive_merge(merges: int, class_token: bool) -> None:
    features, sizes, counts = drawn(4, 21, 6), drawn(4, 21, seed=1).abs() + 1, [21, 0, 1, 12]
    with use("torch"):
        found = bipartite_merge(features, merges, sizes=sizes, counts=torch.tensor(counts), class_token=class_token)
    for row, count in enumerate(counts):
        merged, places, source = naive(features[row, :count], sizes[row, :count], merges, class_token)
        left = len(places)
        assert found.places[row].tolist() == places + [-1] * (found.places.shape[1] - left)
        assert found.source[row].tolist() == source + [-1] * (21 - count)
        torch.testing.assert_close(found.features[row, :left], merged)
        torch.testing.assert_close(found.sizes[row].sum(), sizes[row, :count].sum())
        assert not found.features[row, left:].any()
        assert not found.sizes[row, left:].any()


def test_similarity_can_be_that_of_something_else() -> None:
    features, metric = drawn(2, 9, 3), drawn(2, 9, 5, seed=1)
    with use("torch"):
        found = bipartite_merge(features, 3, metric=metric)
        places, source = bipartite_match(metric, 3)
    assert found.places.equal(places)
    assert found.source.equal(source)
    assert found.sizes.sum(dim=1).tolist() == [9.0, 9.0]
    torch.testing.assert_close((found.features * found.sizes[..., None]).sum(dim=1), features.sum(dim=1))


def test_groups_without_members_and_rows_without_groups() -> None:
    merged, sizes = average_groups(torch.ones(1, 3, 2), torch.ones(1, 3), torch.tensor([[2, -1, 2]]), 3)
    assert merged.tolist() == [[[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]]
    assert sizes.tolist() == [[0.0, 0.0, 2.0]]
    assert average_groups(torch.ones(2, 0, 3), None, torch.zeros(2, 0, dtype=torch.int64), 2)[0].shape == (2, 2, 3)
    assert bipartite_merge(torch.ones(0, 4, 3), 2).source.shape == (0, 4)


def test_gradients_reach_the_features() -> None:
    features = drawn(1, 6, 3).requires_grad_()
    bipartite_merge(features, 2).features.sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad.sum(), torch.tensor(12.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(3, 2)}, ValueError, "metric has shape"),
        ({"merges": -1}, ValueError, "merges=-1 must be"),
        ({"sizes": torch.ones(1, 2)}, ValueError, "sizes has shape"),
        ({"metric": torch.ones(1, 2, 2)}, ValueError, "source has shape"),
        ({"counts": torch.tensor([4])}, ValueError, r"counts=\[4\] must lie in 0..3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bipartite_merge(**({"features": torch.zeros(1, 3, 2), "merges": 1} | arguments))  # type: ignore[arg-type]


def same(features: Tensor, merges: int, **options: object) -> Merged:
    with use("torch"):
        expected = bipartite_merge(features, merges, **options)  # type: ignore[arg-type]
    with use("triton"):
        found = bipartite_merge(features, merges, **options)  # type: ignore[arg-type]
    assert found.places.equal(expected.places)
    assert found.source.equal(expected.source)
    torch.testing.assert_close(found.sizes, expected.sizes)
    assert found.features.dtype == features.dtype
    scale = float(expected.features.float().abs().max()) if expected.features.numel() else 0.0
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=TOLERANCE[features.dtype] * scale)
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("width", [60, 100])
def test_triton_merges_the_same(dtype: torch.dtype, class_token: bool, width: int, device: torch.device) -> None:
    features = drawn(63, width, 3).to(device, dtype).permute(2, 0, 1)
    assert not features.is_contiguous()
    sizes, counts = drawn(3, 63, seed=1).abs().to(device) + 1, torch.tensor([63, 0, 8], device=device)
    same(features, 20, sizes=sizes, counts=counts, class_token=class_token)


@pytest.mark.interpreter
def test_triton_breaks_ties_alike(device: torch.device) -> None:
    found = same(torch.ones(1, 66, 2, device=device), 2)
    # All pairs are alike: the first two even rows join the first odd one.
    assert found.source[0, :4].tolist() == [31, 31, 31, 32]
    same(torch.eye(4, device=device).repeat(20, 1)[None], 40)
    same(torch.zeros(2, 5, 3, device=device), 2)


@pytest.mark.interpreter
def test_triton_leaves_padding_alone(device: torch.device) -> None:
    features = drawn(2, 21, 5).to(device)
    features[1, 12:] = torch.nan
    found = same(features, 6, counts=torch.tensor([21, 12], device=device))
    assert bool(found.features.isfinite().all())


@pytest.mark.interpreter
def test_triton_is_not_taken_where_gradients_are_wanted(device: torch.device) -> None:
    features = drawn(1, 6, 3).to(device).requires_grad_()
    assert bipartite_merge(features, 2).features.requires_grad
    with use("triton"), pytest.raises(RuntimeError, match="gradients are wanted"):
        bipartite_merge(features, 2)


@pytest.mark.interpreter
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 40), width=st.integers(2, 9), merges=st.integers(0, 20), class_token=st.booleans())
def test_triton_takes_any_shape(total: int, width: int, merges: int, class_token: bool, device: torch.device) -> None:
    same(drawn(2, total, width, seed=total).to(device), merges, class_token=class_token)


@pytest.mark.gpu
def test_sizes_of_real_images() -> None:
    counts = torch.tensor([576, 500, 64, 1], device="cuda")
    same(drawn(4, 576, 1024).cuda(), 200, counts=counts)
