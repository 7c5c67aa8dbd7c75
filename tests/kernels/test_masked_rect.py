"""masked_rect: rectangles say who sees whom, forwards and backwards, as the masks of methods do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.masked_rect import masked_rect, rectangles_of
from mmfast.token_pruning.in_llm.aki_mma import AkiMMA, mutual_mask
from mmfast.token_pruning.in_llm.saisa import naavit_mask
from support.dense import TOLERANCES, assert_near, dense_attention

CPU = torch.device("cpu")
SHAPES = [
    # batch, heads, groups, rows, columns, width, width of values
    (2, 4, 2, 63, 63, 32, 32),
    (1, 6, 2, 40, 97, 60, 60),
    (2, 2, 1, 1, 33, 100, 16),
    (1, 2, 2, 80, 80, 16, 16),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def states(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    batch, heads, groups, rows, columns, width, own = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, rows, width), (batch, groups, columns, width), (batch, groups, columns, own))
    return tuple(torch.randn(*size, generator=generator).to(device, dtype) for size in sizes)


def rules(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Random rectangles, most of them causal, with rows that see nothing and columns that nobody sees."""
    batch, _, _, rows, columns, _, _ = shape
    generator = torch.Generator().manual_seed(seed)
    vertical = torch.randint(rows + 1, (batch, 3, 2), generator=generator)
    across = torch.randint(columns + 1, (batch, 3, 2), generator=generator).sort(dim=-1).values
    causal = torch.rand(batch, 3, 1, generator=generator) > 0.4
    rectangles = torch.cat([vertical, across, causal], dim=-1)
    rectangles[0, 0] = torch.tensor([0, max(1, rows - 2), 0, columns, 1])
    places = torch.rand(batch, columns, generator=generator).argsort(dim=-1)[:, :rows].sort(dim=-1).values
    valid = torch.rand(batch, columns, generator=generator) > 0.2
    return {"rectangles": rectangles.to(device), "places": places.to(device), "valid": valid.to(device)}


def written_out(rules: dict[str, Any], rows: int, columns: int) -> Tensor:
    """The mask, pair by pair."""
    mask = torch.zeros(len(rules["rectangles"]), rows, columns, dtype=torch.bool)
    for index, own in enumerate(rules["rectangles"].tolist()):
        for top, bottom, left, right, causal in own:
            for row in range(top, bottom):
                end = min(right, int(rules["places"][index, row]) + 1) if causal else right
                mask[index, row, left : max(left, end)] = True
    return (mask & rules["valid"].cpu()[:, None]).to(rules["valid"].device)


@by_shape
def test_rectangles_are_the_mask(shape: tuple[int, ...]) -> None:
    query, key, value = states(shape, torch.float32, CPU)
    given = rules(shape, CPU)
    mask = written_out(given, shape[3], shape[4])[:, None]
    with use("torch"):
        found = masked_rect(query, key, value, **given, scaling=0.3, softcap=2.0)
    assert_near(found, dense_attention(query, key, value, mask, scaling=0.3, softcap=2.0), torch.float32)


@settings(max_examples=40, deadline=None)
@drawn(rows=st.integers(1, 12), more=st.integers(0, 9), seed=st.integers(0, 9999))
def test_any_rectangles(rows: int, more: int, seed: int) -> None:
    shape = (2, 2, 1, rows, rows + more, 5, 3)
    query, key, value = states(shape, torch.float32, CPU, seed)
    given = rules(shape, CPU, seed)
    mask = written_out(given, rows, rows + more)[:, None]
    with use("torch"):
        assert_near(masked_rect(query, key, value, **given), dense_attention(query, key, value, mask), torch.float32)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels.masked_rect import reference

    query, key, value = states(SHAPES[0], torch.float32, CPU)
    given = rules(SHAPES[0], CPU)
    mask = written_out(given, 63, 63)[:, None]
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 5000)
    with use("torch"):
        assert_near(masked_rect(query, key, value, **given), dense_attention(query, key, value, mask), torch.float32)


def visible_in(rectangles: Tensor, rows: int, columns: int, places: Tensor | None = None) -> Tensor:
    """Read a mask off attention: values are one-hot, so that what gets a share is what is seen."""
    query, key = torch.zeros(1, 1, rows, 2), torch.zeros(1, 1, columns, 2)
    with use("torch"):
        output, _ = masked_rect(query, key, torch.eye(columns)[None, None], rectangles, places=places)
    return output[0, 0] > 0


def test_modality_mutual_attention_is_rectangles() -> None:
    media = [torch.tensor([2, 3, 4]), torch.tensor([7, 8])]
    pairs = AkiMMA().visible(media, torch.tensor([0, 1, 5, 6, 9, 10, 11]))
    rectangles = rectangles_of(pairs, [(0, 12, 0, 12)], device=CPU)
    assert len(rectangles) == 4
    assert torch.equal(visible_in(rectangles, 12, 12), mutual_mask(torch.ones(12, dtype=torch.bool), pairs))


def test_rows_that_never_look_are_left_out() -> None:
    visual = torch.tensor([False, True, True, False, True, False, False])
    places = (~visual).nonzero().flatten()[None]
    rectangles = rectangles_of([], [(0, 4, 0, 7)], device=CPU)
    assert torch.equal(visible_in(rectangles, 4, 7, places), naavit_mask(visual))


def test_compression_tokens_hide_what_is_before_them() -> None:
    """Up to the last of them plain causality; behind it nothing before the first."""
    first, last, length = 6, 7, 12
    rectangles = rectangles_of([], [(0, last + 1, 0, length), (last + 1, length, first, length)], device=CPU)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[last + 1 :, :first] = False
    assert torch.equal(visible_in(rectangles, length, length), mask)


def gradients(backend: Any, inputs: tuple[Tensor, ...], towards: tuple[Tensor, Tensor], given: Any) -> list[Tensor]:
    leaves = [states.detach().clone().requires_grad_() for states in inputs]
    with use(backend):
        output, weight = masked_rect(*leaves, **given)
    seen = weight.masked_fill(weight.isinf(), 0.0)
    ((output.float() * towards[0]).sum() + (seen * towards[1]).sum()).backward()
    return [leaf.grad for leaf in leaves]


def test_gradients_of_rows_that_see_nothing_are_zero() -> None:
    inputs = states(SHAPES[3], torch.float32, CPU)
    rectangles = torch.tensor([[0, 40, 0, 80, 1]])
    towards = (torch.ones(1, 2, 80, 16), torch.ones(1, 2, 80))
    of_query, of_key, of_value = gradients("torch", inputs, towards, {"rectangles": rectangles})
    assert not of_query[:, :, 40:].any()
    assert not of_key[:, :, 40:].any()
    assert all(bool(one.isfinite().all()) for one in (of_query, of_key, of_value))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@by_shape
def test_triton_agrees(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = states(shape, dtype, device)
    for given in ({"rectangles": torch.tensor([[0, 99, 0, 99, 1]], device=device)}, rules(shape, device)):
        with use("torch"):
            wanted = masked_rect(query, key, value, **given)
        with use("triton"):
            found = masked_rect(query, key, value, **given)
        assert found[0].dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=["square", "wide"])
def test_triton_agrees_backwards(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs = states(shape, dtype, device)
    given = rules(shape, device) | {"softcap": 2.0}
    generator = torch.Generator().manual_seed(3)
    batch, heads, _, rows, _, _, own = shape
    towards = tuple(
        torch.randn(*size, generator=generator).to(device) for size in ((batch, heads, rows, own), (batch, heads, rows))
    )
    wanted = gradients("torch", inputs, towards, given)
    for mine, other in zip(gradients("triton", inputs, towards, given), wanted, strict=True):
        error = (mine.float() - other.float()).abs().max() / other.float().abs().max()
        assert error <= TOLERANCES[dtype]


@pytest.mark.interpreter
def test_triton_with_any_strides_and_empty_rectangles(device: torch.device) -> None:
    query, key, value = (
        one.transpose(1, 2).contiguous().transpose(1, 2) for one in states(SHAPES[0], torch.float32, device)
    )
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    rectangles = torch.tensor([[5, 5, 0, 63, 0], [0, 63, 9, 9, 0], [9, 3, 20, 30, 0], [0, 30, 0, 63, 1]], device=device)
    with use("torch"):
        wanted = masked_rect(query, key, value, rectangles)
    with use("triton"):
        found = masked_rect(query, key, value, rectangles)
        nothing = masked_rect(query, key, value, rectangles[:0])
    assert_near(found, wanted, torch.float32)
    assert not nothing[0].any()
    assert (nothing[1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rectangles": torch.zeros(1, 5)}, "rectangles is torch.float32"),
        ({"rectangles": torch.zeros(1, 4, dtype=torch.int64)}, "rectangles has shape"),
        ({"rectangles": torch.zeros(3, 1, 5, dtype=torch.int64)}, "rectangles has shape"),
        ({"places": torch.zeros(2, 62, dtype=torch.int64)}, "places has shape"),
        ({"places": torch.zeros(2, 63)}, "places is torch.float32"),
        ({"valid": torch.ones(2, 63)}, "valid is torch.float32"),
        ({"valid": torch.ones(2, 62, dtype=torch.bool)}, "valid has shape"),
        ({"key": torch.zeros(2, 2, 62, 32), "value": torch.zeros(2, 2, 62, 32)}, "say with places"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), states(SHAPES[0], torch.float32, CPU), strict=True))
    arguments["rectangles"] = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=message):
        masked_rect(**arguments | changes)
