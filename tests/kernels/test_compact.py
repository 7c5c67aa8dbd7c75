"""Gathering what is kept per token: plain torch against loops, Triton against plain torch, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast import kernels
from mmfast.kernels.compact import compact, refusal


def tensors(batch: int = 2, tokens: int = 9, device: torch.device | str = "cpu") -> list[Tensor]:
    """Everything a layer keeps per token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = [
        random(batch, tokens, 130).bfloat16(),
        random(1, tokens, 6),
        random(batch, tokens, 60).half()[:, :, ::2],
        random(batch, tokens) > 0,
        torch.arange(batch * tokens).reshape(batch, tokens),
        random(batch, 3, tokens, 20).bfloat16(),
        random(batch, tokens, 3, 20).transpose(1, 2),
    ]
    return [tensor.to(device) for tensor in found]


INDICES = torch.tensor([[0, 3, 8, 4], [1, 2, 2, 0]])
VALID = torch.tensor([[True, True, True, False], [True, False, True, False]])


def naive(tensor: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    axis = 2 if tensor.ndim == 4 else 1
    rows = []
    for row, own in enumerate(indices.tolist()):
        whole = tensor[row if len(tensor) > 1 else 0]
        picked = [whole.select(axis - 1, index if valid[row, place] else 0) for place, index in enumerate(own)]
        picked = [part if valid[row, place] else torch.zeros_like(part) for place, part in enumerate(picked)]
        rows.append(torch.stack(picked, dim=axis - 1))
    return torch.stack(rows)


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == other.dtype
        assert own.is_contiguous()
        assert torch.equal(own.cpu(), other.cpu())


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "ragged"])
def test_reference_is_the_loop(valid: Tensor | None) -> None:
    wanted = [naive(tensor, INDICES, torch.ones_like(VALID) if valid is None else valid) for tensor in tensors()]
    with kernels.use("torch"):
        same(compact(INDICES, tensors(), valid=valid), wanted)


def test_an_index_that_does_not_count_is_not_looked_at() -> None:
    wild = INDICES.masked_fill(~VALID, 10**9)
    same(compact(wild, tensors(), valid=VALID), compact(INDICES, tensors(), valid=VALID))


def test_nothing_to_gather() -> None:
    assert compact(INDICES, []) == []
    assert [tuple(part.shape) for part in compact(INDICES[:, :0], tensors()[-2:])] == [(2, 3, 0, 20)] * 2


def test_a_gradient_flows_through_plain_torch() -> None:
    states = torch.ones(1, 3, 2, requires_grad=True)
    compact(torch.tensor([[2, 2]]), [states], valid=torch.tensor([[True, False]]))[0].sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [[[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]]
    assert "backward" in refusal(states)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compact(INDICES[0], tensors()), ValueError, r"indices \[4\]"),
        (lambda: compact(INDICES.int(), tensors()), TypeError, "int64"),
        (lambda: compact(INDICES, tensors(), valid=VALID.long()), TypeError, "bool"),
        (lambda: compact(INDICES, tensors(), valid=VALID[:, :2]), ValueError, "valid"),
        (lambda: compact(INDICES, [torch.zeros(3, 5)]), ValueError, r"tensors\[0\] \[3, 5\]"),
        (lambda: compact(INDICES, [torch.zeros(2, 0, 4)]), ValueError, "no tokens"),
    ],
    ids=["indices", "dtype", "valid dtype", "valid", "batch", "empty"],
)
def test_wrong_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def both(indices: Tensor, given: list[Tensor], valid: Tensor | None) -> None:
    with kernels.use("torch"):
        wanted = compact(indices, given, valid=valid)
    with kernels.use("triton"):
        same(compact(indices, given, valid=valid), wanted)


@pytest.mark.interpreter
@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "ragged"])
def test_triton_is_the_reference(valid: Tensor | None, device: torch.device) -> None:
    both(INDICES.to(device), tensors(device=device), None if valid is None else valid.to(device))


@pytest.mark.interpreter
def test_a_row_that_keeps_nothing(device: torch.device) -> None:
    valid = torch.tensor([[True] * 5, [False] * 5], device=device)
    indices = torch.arange(0, 50, 10, device=device).expand(2, 5)
    both(indices, [torch.rand(2, 63, 100, device=device), torch.rand(2, 63, device=device)], valid)


@pytest.mark.interpreter
def test_many_tensors_take_several_launches(device: torch.device) -> None:
    both(INDICES.to(device), tensors(device=device) * 2, VALID.to(device))


@pytest.mark.interpreter
def test_a_wild_index_reads_nothing(device: torch.device) -> None:
    wild = INDICES.masked_fill(~VALID, 10**9).to(device)
    both(wild, tensors(device=device), VALID.to(device))


@pytest.mark.interpreter
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 20), count=st.integers(0, 35))
def test_any_shape(device: torch.device, data: st.DataObject, batch: int, tokens: int, count: int) -> None:
    width, groups = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    indices = torch.randint(0, tokens, (batch, count), generator=generator)
    valid = torch.rand(batch, count, generator=generator) > 0.3
    given = [
        torch.randn(batch, tokens, width, generator=generator),
        torch.randn(batch, groups, tokens, max(1, width), generator=generator).half(),
        torch.rand(1, tokens, generator=generator) > 0.5,
    ]
    both(indices.to(device), [tensor.to(device) for tensor in given], valid.to(device))


@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_compile(batch: int, compile_only: Callable[[ModuleType], list[str]]) -> None:
    from mmfast.kernels.compact import triton

    done = compile_only(triton)
    triton.compact(INDICES[:batch], tensors(batch), VALID[:batch])
    triton.compact(INDICES[:batch], tensors(batch)[:1], None)
    assert done == ["_compact_kernel"] * 2
