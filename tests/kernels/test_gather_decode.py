"""gather_decode: what is named or marked is all that is seen, in torch and in Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.gather_decode import gather_decode
from support.dense import assert_near, dense_attention


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 4
    groups: int = 2
    tokens: int = 1
    width: int = 32
    values: int = 32
    stored: int = 63
    most: int = 20
    sources: int = 2


SHAPES = [
    Shape(),
    Shape(heads=6, width=60, values=60, stored=150, most=140),
    Shape(batch=1, heads=4, groups=4, sources=4, tokens=3, width=100, values=16, stored=33, most=33),
    Shape(heads=8, groups=1, sources=1, tokens=8, stored=70, most=40),
    Shape(heads=4, groups=2, sources=4, tokens=2),
    Shape(batch=3, heads=2, groups=1, sources=1, stored=1, most=1),
]
ids = {"argvalues": SHAPES, "ids": lambda shape: "-".join(str(size) for size in vars(shape).values())}


def states(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    return (
        draw(shape.batch, shape.heads, shape.tokens, shape.width),
        draw(shape.batch, shape.groups, shape.stored, shape.width),
        draw(shape.batch, shape.groups, shape.stored, shape.values),
    )


def ragged(shape: Shape, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unordered indices without repeats, how many of them are real, and the same as a mask."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(shape.batch, shape.sources, shape.stored, generator=generator).argsort(dim=-1)
    indices = order[..., : shape.most].contiguous()
    counts = torch.randint(shape.most + 1, (shape.batch, shape.sources), generator=generator)
    counts[0, 0], counts[-1, -1] = 0, shape.most
    mask = torch.zeros(shape.batch, shape.sources, shape.stored, dtype=torch.bool)
    real = torch.arange(shape.most) < counts[..., None]
    mask.scatter_(2, indices, real)
    # What is behind the count is no index at all.
    return indices.masked_fill(~real, 1 << 20).to(device), counts.to(device), mask.to(device)


def wide(mask: Tensor, heads: int) -> Tensor:
    return mask.repeat_interleave(heads // mask.shape[1], dim=1)[:, :, None]


@pytest.mark.parametrize("shape", **ids)
def test_what_is_named_is_what_is_marked(shape: Shape) -> None:
    query, key, value = states(shape, torch.float32, torch.device("cpu"))
    indices, counts, mask = ragged(shape, query.device)
    wanted = dense_attention(query, key, value, wide(mask, shape.heads))
    with use("torch"):
        assert_near(gather_decode(query, key, value, indices=indices, counts=counts), wanted, query.dtype)
        # Without counts: what is out of range stands for nothing.
        assert_near(gather_decode(query, key, value, indices=indices), wanted, query.dtype)
        assert_near(gather_decode(query, key, value, kept=mask), wanted, query.dtype)


def test_bias_limits_cap_and_rows_of_their_own() -> None:
    shape = Shape(tokens=3, sources=4)
    query, key, value = states(shape, torch.float32, torch.device("cpu"))
    options = _options(shape, query.device)
    _, _, mask = ragged(shape, query.device)
    rows = torch.rand(2, 4, 3, shape.stored) > 0.5
    for kept, shown in ((mask, wide(mask, 4)), (rows, rows)):
        with use("torch"):
            found = gather_decode(query, key, value, kept=kept, **options)
        assert_near(found, _dense(query, key, value, shown, options), query.dtype)


def _options(shape: Shape, device: torch.device, seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "bias": torch.randn(shape.batch, shape.groups, shape.stored, generator=generator).to(device),
        "limits": torch.randint(shape.stored, (shape.batch, shape.tokens), generator=generator).to(device),
        "scaling": 0.3,
        "softcap": 2.0,
    }


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    below = torch.arange(key.shape[2], device=key.device) <= options["limits"][:, None, :, None]
    rest = {"scaling": options["scaling"], "softcap": options["softcap"]}
    return dense_attention(query, key, value, mask & below, bias=wide(options["bias"], query.shape[1]), **rest)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    tokens=st.integers(1, 8),
    stored=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_any_shape(groups: int, share: int, tokens: int, stored: int, seed: int) -> None:
    shape = Shape(2, groups * share, groups, tokens, 5, 7, stored, stored // 2 + 1, groups)
    query, key, value = states(shape, torch.float32, torch.device("cpu"), seed)
    indices, counts, mask = ragged(shape, query.device, seed)
    options = _options(shape, query.device, seed)
    with use("torch"):
        found = gather_decode(query, key, value, indices=indices, counts=counts, **options)
    assert_near(found, _dense(query, key, value, wide(mask, shape.heads), options), query.dtype)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels import parts
    from mmfast.kernels.gather_decode import reference

    query, key, value = states(Shape(), torch.float32, torch.device("cpu"))
    indices, counts, mask = ragged(Shape(), query.device)
    wanted = dense_attention(query, key, value, wide(mask, 4))
    for module in (parts, reference):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2000)
    with use("torch"):
        assert_near(gather_decode(query, key, value, indices=indices, counts=counts), wanted, query.dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", **ids)
def test_triton_reads_what_torch_gathers(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = states(shape, dtype, device)
    indices, counts, mask = ragged(shape, device)
    choices: list[dict[str, Tensor]] = [{"indices": indices, "counts": counts}, {"indices": indices.int()}]
    for choice in [*choices, {"kept": mask}]:
        with use("torch"):
            wanted = gather_decode(query, key, value, **choice)
        with use("triton"):
            found = gather_decode(query, key, value, **choice)
        assert found[0].dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("named", [True, False], ids=["indices", "kept"])
def test_triton_takes_every_option_and_any_strides(named: bool, device: torch.device) -> None:
    shape = Shape(tokens=3)
    query, key, value = (
        states.transpose(1, 2).contiguous().transpose(1, 2) for states in states(shape, torch.float32, device)
    )
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    indices, counts, mask = ragged(shape, device)
    choice = {"indices": indices, "counts": counts} if named else {"kept": mask[:, :, None].expand(-1, -1, 3, -1)}
    options = _options(shape, device)
    with use("triton"):
        found = gather_decode(query, key, value, **choice, **options)
    assert_near(found, _dense(query, key, value, wide(mask, 4), options), torch.float32)


@pytest.mark.interpreter
def test_triton_does_not_read_what_is_not_kept(device: torch.device) -> None:
    query, key, value = states(Shape(), torch.float32, device)
    _, _, mask = ragged(Shape(), device)
    with use("torch"):
        wanted = gather_decode(query, key, value, kept=mask)
    for tensor in (key, value):
        tensor.masked_fill_(~mask[..., None], torch.nan)
    with use("triton"):
        assert_near(gather_decode(query, key, value, kept=mask), wanted, torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("stored", [0, 5])
def test_triton_on_nothing_at_all(stored: int, device: torch.device) -> None:
    query, key, value = states(Shape(stored=stored), torch.float32, device)
    with use("triton"):
        output, weight = gather_decode(
            query, key, value, kept=torch.zeros(2, 2, stored, dtype=torch.bool, device=device)
        )
    assert not output.any()
    assert (weight == -torch.inf).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": None}, "either indices or kept"),
        ({"kept": torch.ones(2, 2, 63, dtype=torch.bool)}, "either indices or kept"),
        ({"indices": torch.zeros(2, 3, 4, dtype=torch.int64)}, "indices has 3 heads"),
        ({"indices": torch.zeros(1, 2, 4, dtype=torch.int64)}, r"indices has shape \[1, 2, 4\], must be \[B, S, K\]"),
        ({"indices": torch.zeros(2, 2, 4)}, "indices is torch.float32"),
        ({"counts": torch.zeros(2, 3, dtype=torch.int64)}, "counts has shape"),
        ({"indices": None, "kept": torch.ones(2, 2, 63)}, "kept is torch.float32"),
        ({"indices": None, "kept": torch.ones(2, 2, 62, dtype=torch.bool)}, "kept has shape"),
        ({"bias": torch.ones(2, 2, 62)}, "bias has shape"),
        ({"limits": torch.ones(2, 3, dtype=torch.int64)}, "limits has shape"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    query, key, value = states(Shape(), torch.float32, torch.device("cpu"))
    with pytest.raises((TypeError, ValueError), match=message):
        gather_decode(query, key, value, **{"indices": torch.zeros(2, 2, 4, dtype=torch.int64)} | changes)


def test_gradients_are_left_to_torch() -> None:
    query, key, value = states(Shape(), torch.float32, torch.device("cpu"))
    query.requires_grad_()
    output, _ = gather_decode(query, key, value, kept=torch.ones(2, 2, 63, dtype=torch.bool))
    output.sum().backward()
    assert query.grad is not None
    with use("triton"), pytest.raises(RuntimeError, match="'gather_decode' cannot run in Triton"):
        gather_decode(query, key, value, kept=torch.ones(2, 2, 63, dtype=torch.bool))
