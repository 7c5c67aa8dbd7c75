"""KVQuant: outliers are exact, the rest is off by half a code at most."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.packing.kvquant import KVQuant, outlier_mask, with_outliers


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", [1, 2])
def test_outliers_are_exact_and_the_rest_is_off_by_half_a_code(bits: int, axis: int) -> None:
    torch.manual_seed(bits)
    states = torch.randn(1, 100, 100) ** 3
    block = with_outliers(states, axis, bits, 0.9, whole_offset=False)
    error, outliers = (block.restore() - states).abs(), outlier_mask(states, axis, 0.9)
    assert outliers.float().mean() == pytest.approx(0.1, abs=0.01)
    assert (error[outliers] == 0).all()
    assert ((error <= block.inner.scale / 2 * 1.001 + 1e-6) | outliers).all()
    assert error[~outliers].any()


def test_a_whole_offset_gives_zero_a_code() -> None:
    states = torch.tensor([[[-1.1, 0.0, 0.4, 2.0]]])
    assert with_outliers(states, 2, 2, 1.0, whole_offset=True).restore()[0, 0, 1] == 0
    assert with_outliers(states, 2, 2, 1.0, whole_offset=False).restore()[0, 0, 1] != 0


@pytest.mark.parametrize("tokens", [2, 7, 100, 201])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_outliers_lie_beyond_the_quantiles_of_torch(tokens: int, threshold: float) -> None:
    torch.manual_seed(tokens)
    states = torch.randn(2, tokens, 16)
    upper = 1 - (1 - threshold) / 2
    low, high = (states.quantile(share, dim=1, keepdim=True) for share in (1 - upper, upper))
    assert torch.equal(outlier_mask(states, 1, threshold), (states <= low) | (states >= high))


def test_codes_are_packed_and_counted_to_the_byte() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 100, 32, dtype=torch.bfloat16)
    block = KVQuant(bits=3, threshold=1.0).pack(states, "key", None)
    # Ten codes of three bits are a word.
    expected = 64 * 10 * 4 + 64 * 2 * 2
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == expected
    sparse = KVQuant(bits=3, threshold=0.9).pack(states, "key", None)
    count = int(outlier_mask(states, 1, 0.9).sum())
    assert sum(tensor.numel() * tensor.element_size() for tensor in sparse.tensors()) == expected + count * 6


def test_the_start_of_the_prompt_stays() -> None:
    states = torch.randn(2, 64, 8)
    for side in ("key", "value"):
        restored = KVQuant(bits=2, first=3).pack(states, side, Entries.of(states, states)).restore()
        assert torch.equal(restored[:, :3], states[:, :3])
        assert not torch.equal(restored[:, 3:], states[:, 3:])


def test_constant_channels_come_back() -> None:
    states = torch.full((1, 20, 4), -0.7)
    for threshold in (1.0, 0.99):
        assert torch.equal(KVQuant(threshold=threshold).pack(states, "key", None).restore(), states)


def test_keys_wait_for_a_whole_residual_and_values_do_not() -> None:
    assert [KVQuant().due(loose, "key") for loose in (127, 300)] == [0, 256]
    assert [KVQuant().due(loose, "value") for loose in (127, 300)] == [0, 172]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    states = torch.randn(1, tokens, 5).to(dtype)
    for side in ("key", "value"):
        for entries in (None, Entries.of(states, states)):
            restored = KVQuant().pack(states, side, entries).restore()
            assert (restored.shape, restored.dtype) == (states.shape, dtype)
            assert restored.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 6}, "bits=6 must be one of 2, 3, 4, 5, 8"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0 and at most 1"),
        ({"first": -1}, "first=-1 must be an int of at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVQuant(**options)
