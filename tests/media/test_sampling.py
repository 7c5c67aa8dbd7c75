"""The sampling rules against their formulas, and what holds for all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.media import SAMPLERS, MediaError, choose_frames
from mmfast.media.sampling import COUNT_SAMPLERS, RATE_SAMPLERS, fps, internvl, linspace, midpoint, stride

totals = st.integers(1, 5000)
counts = st.integers(1, 768)


@pytest.mark.parametrize("name", COUNT_SAMPLERS)
@given(total=totals, count=counts)
def test_counts_are_kept(name: str, total: int, count: int) -> None:
    indices = COUNT_SAMPLERS[name](total, count)
    assert len(indices) == min(count, total)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < total


@pytest.mark.parametrize("name", RATE_SAMPLERS)
@given(total=totals, source=st.floats(1, 120), wanted=st.floats(0.05, 240), most=st.integers(1, 768))
def test_rates_stay_in_range(name: str, total: int, source: float, wanted: float, most: int) -> None:
    indices = RATE_SAMPLERS[name](total, source, wanted, most)
    assert 1 <= len(indices) <= min(most, total)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < total


@given(total=totals, count=counts)
def test_linspace_cuts_off(total: int, count: int) -> None:
    if count < total:
        assert linspace(total, count) == np.linspace(0, total - 1, count, dtype=int).tolist()


def test_midpoint_by_hand() -> None:
    # M=11, n=4: s=2.5, borders round(0, 2.5, 5, 7.5, 10) = 0, 2, 5, 8, 10 with halves to even.
    assert midpoint(11, 4) == [1, 3, 6, 9]


def test_internvl_by_hand() -> None:
    # M=11, n=4: s=2.5, int(1.25 + [0, 2, 5, 8]).
    assert internvl(11, 4) == [1, 3, 6, 9]


@given(total=st.integers(4, 3000), source=st.sampled_from([15.0, 23.976, 25.0, 29.97, 30.0, 60.0]))
def test_fps_is_the_rule_of_qwen(total: int, source: float) -> None:
    upper = min(768, total) // 2 * 2
    count = math.floor(min(min(max(total / source * 2.0, 4), upper), total) / 2) * 2
    expected = torch.linspace(0, total - 1, count).round().long().tolist()
    assert fps(total, source, 2.0) == expected


def test_stride_is_one_frame_per_second() -> None:
    assert stride(250, 29.97, 1.0, 64) == list(range(0, 250, 30))
    assert stride(64 * 30 + 1, 30.0, 1.0, 64) == linspace(64 * 30 + 1, 64)


def test_defaults() -> None:
    assert choose_frames(1000, 25.0) == linspace(1000, 32)
    assert choose_frames(1000, 25.0, max_frames=5) == linspace(1000, 5)
    assert choose_frames(1000, 25.0, fps=1.0) == fps(1000, 25.0, 1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_works(name: str) -> None:
    number = {"num_frames": 8} if name in COUNT_SAMPLERS else {"fps": 2.0}
    assert len(choose_frames(100, 25.0, sampler=name, **number)) == 8 + (name == "stride")


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(MediaError, match="did you mean 'midpoint'"):
        choose_frames(100, 25.0, num_frames=4, sampler="midpoints")
