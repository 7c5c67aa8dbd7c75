"""GEAR: exact outliers, and an error that rank makes smaller."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.packing.gear import Gear


@pytest.mark.parametrize("side", ["key", "value"])
def test_the_error_falls_with_the_rank(side: str) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 128, 32)
    errors = [(Gear(rank=rank).pack(states, side, None).restore() - states).norm() for rank in (0, 2, 8, 32)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    # The matrix has full rank, so nothing is left of the error.
    assert errors[3] < 1e-3


def test_the_low_rank_matrix_is_about_the_best_there_is() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 64, 16)
    method = Gear(rank=3, loop=400)
    block = method.pack(states, "value", None)
    error = states - method.quantise(states, "value").restore()
    left, sizes, right = torch.linalg.svd(error[0])
    best = left[:, :3] @ torch.diag(sizes[:3]) @ right[:3]
    torch.testing.assert_close((error[0] - block.correction()[0]).norm(), (error[0] - best).norm(), rtol=1e-3, atol=0)


def test_outliers_are_exact_in_the_quantised_block() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 128, 32)
    states[1, 70, 3], states[0, 9, 30] = 500.0, -400.0
    for side in ("key", "value"):
        restored = Gear(sparsity=0.04).quantise(states, side).restore()
        assert (restored[1, 70, 3], restored[0, 9, 30]) == (500.0, -400.0)
        without = Gear(sparsity=0.0).quantise(states, side).restore()
        assert (restored - states).norm() < 0.7 * (without - states).norm()


def test_the_share_of_outliers_in_keys_follows_the_number_of_tokens() -> None:
    wide = torch.zeros(1, 400, 64)
    assert Gear(sparsity=0.1).outliers_per_side(wide, "key") == 20
    assert Gear(sparsity=0.1).outliers_per_side(wide, "value") == 3
    assert Gear(sparsity=0.1, compat="official").outliers_per_side(wide, "key") == 3
    # Never more than there are.
    assert Gear(sparsity=1.0, compat="official").outliers_per_side(wide[:, :6], "key") == 3


def test_what_is_stored_is_counted_to_the_byte() -> None:
    states = torch.randn(2, 128, 32, dtype=torch.bfloat16)
    block = Gear(bits=2, group=64, sparsity=0.04, rank=4).pack(states, "value", None)
    codes, scales, outliers = states.numel() // 4, 128, 128 * 2 * 1
    factors = 2 * 4 * (128 + 32)
    expected = codes + 2 * scales * 2 + outliers * (4 + 2) + factors * 2
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == expected


def test_the_seed_makes_runs_equal() -> None:
    states = torch.randn(1, 64, 32)
    first, second, other = (Gear(seed=seed).pack(states, "key", None).restore() for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_both_sides_wait_for_a_whole_residual() -> None:
    for side in ("key", "value"):
        assert [Gear().due(loose, side) for loose in (63, 64, 150)] == [0, 64, 128]
        assert Gear(residual=0).due(70, side) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    states = torch.randn(1, tokens, 10).to(dtype)
    for side in ("key", "value"):
        for entries in (None, Entries.of(states, states)):
            restored = Gear().pack(states, side, entries).restore()
            assert (restored.shape, restored.dtype) == (states.shape, dtype)
            assert restored.isfinite().all()
    assert torch.equal(Gear().pack(states[:, :9], "key", None).restore(), states[:, :9])


def test_constant_blocks_come_back_exactly() -> None:
    states = torch.full((2, 64, 8), 0.3)
    for side in ("key", "value"):
        torch.testing.assert_close(Gear().pack(states, side, None).restore(), states, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 must be one of 2, 4, 8"),
        ({"sparsity": 1.5}, "sparsity=1.5 must lie between 0 and 1"),
        ({"rank": -1}, "rank=-1 must be an int of at least 0"),
        ({"loop": 0}, "loop=0 must be an int of at least 1"),
        ({"residual": 32}, "residual=32 must be a multiple of group=64"),
        ({"compat": "paper"}, "compat='paper' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gear(**options)
