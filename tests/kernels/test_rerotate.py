"""Keys at other positions: plain torch against rotation by complex numbers, Triton against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast import kernels
from mmfast.kernels.rerotate import refusal, rerotate

CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(positions: Tensor, rotated: int) -> Tensor:
    """``[..., r / 2]``: every pair of channels turns at a speed of its own."""
    return positions[..., None].double() * 100.0 ** -torch.linspace(0, 1, rotated // 2).double()


def tables(positions: Tensor, rotated: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    own = angles(positions, rotated)
    own = torch.cat([own, own], dim=-1)
    return (scale * own.cos()).float(), (scale * own.sin()).float()


def turned(states: Tensor, positions: Tensor, rotated: int, scale: float = 1.0) -> Tensor:
    """Rotate by complex numbers: the two halves are the real and the imaginary parts."""
    first, second = states[..., :rotated].double().chunk(2, dim=-1)
    whole = torch.complex(first, second) * torch.polar(torch.tensor(scale).double(), angles(positions, rotated))
    return torch.cat([whole.real, whole.imag, states[..., rotated:].double()], dim=-1)


@pytest.mark.parametrize("rotated", [2, 6, 10])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_keys_end_where_they_would_have_been(rotated: int, scale: float) -> None:
    plain = random(2, 3, 5, 10)
    before, after = torch.tensor([0, 3, 4, 9, 20]), torch.tensor([[[0, 1, 2, 3, 4]] * 3, [[4, 4, 0, 2, 1]] * 3])
    keys = turned(plain, before, rotated, scale).float()
    wanted = turned(plain, after, rotated)
    every = torch.arange(6)
    with kernels.use("torch"):
        found = rerotate(keys, tables(before, rotated, scale), tables(every, rotated), after)
        assert (found - wanted).abs().max() < 1e-5
        found = rerotate(keys, tables(before, rotated, scale), tables(after[:, 0], rotated))
        assert (found - wanted).abs().max() < 1e-5
        own = rerotate(
            keys, tables(before.expand(2, -1), rotated, scale), tables(every.expand(1, -1), rotated), after[:, 0]
        )
        assert torch.equal(own, rerotate(keys, tables(before, rotated, scale), tables(every, rotated), after))


def test_a_gradient_flows_through_plain_torch() -> None:
    keys = random(1, 1, 2, 4).requires_grad_()
    there = tables(torch.arange(2), 4)
    rerotate(keys, there, tables(torch.arange(2) + 3, 4)).square().sum().backward()
    # A rotation keeps the length.
    assert keys.grad is not None
    assert torch.allclose(keys.grad, 2 * keys, atol=1e-5)
    assert "backward" in refusal(keys)


def wrong() -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    keys, own = random(2, 3, 5, 8), tables(torch.arange(5), 8)
    return {
        "keys": (lambda: rerotate(keys[0], own, own), ValueError, "keys"),
        "old": (lambda: rerotate(keys, tables(torch.arange(4), 8), own), ValueError, "old"),
        "pair": (lambda: rerotate(keys, (own[0], own[1][:3]), own), ValueError, "two of"),
        "new": (lambda: rerotate(keys, own, tables(torch.arange(4), 8)), ValueError, "new"),
        "width": (lambda: rerotate(keys, own, tables(torch.arange(5), 6)), ValueError, "even number"),
        "wide": (lambda: rerotate(keys[..., :6], own, own), ValueError, "at most the 6"),
        "places": (lambda: rerotate(keys, own, own, torch.arange(4)), ValueError, "places"),
        "dtype": (lambda: rerotate(keys, own, own, torch.ones(5)), TypeError, "int64"),
    }


@pytest.mark.parametrize("name", wrong())
def test_wrong_arguments_are_named(name: str) -> None:
    call, error, message = wrong()[name]
    with pytest.raises(error, match=message):
        call()


def both(keys: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], places: Tensor | None) -> None:
    with kernels.use("torch"):
        wanted = rerotate(keys, old, new, places)
    with kernels.use("triton"):
        found = rerotate(keys, old, new, places)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    found, wanted = found.float(), wanted.float()
    assert bool(found.isfinite().all())
    if wanted.numel():
        assert (found - wanted).abs().max() <= CLOSE[keys.dtype] * max(1.0, float(wanted.abs().max()))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("count", "width", "rotated"), [(63, 60, 60), (1, 100, 40), (300, 128, 128)])
def test_triton_is_the_reference(
    dtype: torch.dtype, count: int, width: int, rotated: int, device: torch.device
) -> None:
    keys = random(2, count, 2, width).to(device, dtype).transpose(1, 2)
    old = tuple(table.to(device, dtype) for table in tables(torch.arange(count), rotated, 1.1))
    new = tuple(table.to(device, dtype) for table in tables(torch.arange(count + 3).expand(2, -1), rotated))
    places = (torch.arange(count) // 2).to(device)
    both(keys, (old[0], old[1]), (new[0], new[1]), places)
    both(keys, (old[0], old[1]), (old[1], old[0]), None)
    both(keys, (old[0], old[1]), (new[0], new[1]), torch.stack([places, places + 1]).expand(2, 2, -1))


@pytest.mark.interpreter
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    count=st.integers(0, 40),
    half=st.integers(1, 20),
    rest=st.integers(0, 5),
)
def test_any_shape(device: torch.device, batch: int, groups: int, count: int, half: int, rest: int) -> None:
    keys = random(batch, groups, count, 2 * half + rest).to(device)
    cos, sin = (table.to(device) for table in tables(torch.arange(count), 2 * half))
    both(keys, (cos, sin), (cos.flip(0), sin.flip(0)), None)


@pytest.mark.parametrize("width", [64, 80])
def test_kernels_compile(width: int, compile_only: Callable[[ModuleType], list[str]]) -> None:
    from mmfast.kernels.rerotate import triton

    done = compile_only(triton)
    cos, sin = tables(torch.arange(9), 64)
    keys = random(1, 2, 9, width).bfloat16()
    triton.rerotate(keys, (cos, sin), (cos, sin), torch.arange(9).expand(1, 2, 9))
    triton.rerotate(keys, (cos, sin), (cos, sin), None)
    assert done == ["_rerotate_kernel"] * 2
