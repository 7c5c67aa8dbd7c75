"""shared_prefix: one prefix for a batch and a suffix each give what one attention over both gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.shared_prefix import shared_prefix
from support.dense import assert_near, dense_attention

SHAPES = [
    # batch, heads, groups, tokens, width, prefix, suffix
    (3, 4, 2, 1, 32, 63, 5),
    (2, 6, 2, 3, 60, 150, 1),
    (2, 2, 1, 5, 100, 1, 33),
    (1, 4, 4, 2, 16, 40, 20),
    (20, 4, 1, 1, 16, 70, 3),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, heads, groups, tokens, width, before, after = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    visible = torch.rand(batch, tokens, after, generator=generator) > 0.3
    return {
        "query": draw(batch, heads, tokens, width),
        "prefix": (draw(groups, before, width), draw(groups, before, width)),
        "suffix": (draw(batch, groups, after, width), draw(batch, groups, after, width)),
        "suffix_visible": visible.to(device),
    }


def masks(shape: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    batch, _, groups, tokens, _, before, _ = shape
    generator = torch.Generator().manual_seed(7)
    of_heads = torch.rand(groups, before, generator=generator) > 0.3
    of_rows = torch.rand(batch, tokens, before, generator=generator) > 0.3
    of_rows[-1] = False
    bias = torch.randn(groups, before, generator=generator).to(device)
    return [
        {},
        {"prefix_visible": of_heads.to(device), "prefix_bias": bias, "scaling": 0.4, "softcap": 3.0},
        {"prefix_visible": of_rows.to(device)},
    ]


def dense(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query, (batch, heads, tokens, _) = given["query"], given["query"].shape
    groups, before = given["prefix"][0].shape[:2]
    states = [torch.cat([given["prefix"][i].expand(batch, -1, -1, -1), given["suffix"][i]], dim=2) for i in (0, 1)]
    seen = given.get("prefix_visible", torch.ones(groups, before, dtype=torch.bool, device=query.device))
    seen = seen[:, None] if seen.ndim == 3 else seen.repeat_interleave(heads // groups, dim=0)[None, :, None]
    seen = seen.expand(batch, heads, tokens, -1)
    visible = torch.cat([seen, given["suffix_visible"][:, None].expand(-1, heads, -1, -1)], dim=-1)
    bias = None
    if "prefix_bias" in given:
        bias = torch.zeros(heads, 1, visible.shape[-1], device=query.device)
        bias[:, 0, :before] = given["prefix_bias"].repeat_interleave(heads // groups, dim=0)
    rest = {name: given.get(name) for name in ("scaling", "softcap")}
    return dense_attention(query, *states, visible, bias=bias, **rest)


@by_shape
@pytest.mark.parametrize("mask", [0, 1, 2], ids=["everything", "by-head", "by-row"])
def test_both_parts_give_the_whole(shape: tuple[int, ...], mask: int) -> None:
    given = case(shape, torch.float32, torch.device("cpu")) | masks(shape, torch.device("cpu"))[mask]
    with use("torch"):
        assert_near(shared_prefix(**given), dense(given), torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@by_shape
def test_triton_agrees(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    # Half precision is slow to interpret: what masks do does not depend on it.
    for mask in masks(shape, device) if dtype == torch.float32 else masks(shape, device)[1:2]:
        given = case(shape, dtype, device) | mask
        with use("torch"):
            wanted = shared_prefix(**given)
        with use("triton"):
            found = shared_prefix(**given)
        assert found[0].dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.interpreter
def test_triton_where_a_part_is_empty_or_unseen(device: torch.device) -> None:
    for shape in ((2, 2, 1, 1, 16, 0, 3), (2, 2, 1, 1, 16, 3, 0)):
        given = case(shape, torch.float32, device)
        with use("triton"):
            assert_near(shared_prefix(**given), dense(given), torch.float32)
    given = case(SHAPES[0], torch.float32, device)
    given["suffix_visible"] = torch.zeros_like(given["suffix_visible"])
    given["prefix_visible"] = torch.zeros(2, 63, dtype=torch.bool, device=device)
    with use("triton"):
        output, weight = shared_prefix(**given)
    assert not output.any()
    assert (weight == -torch.inf).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefix", (torch.zeros(3, 9, 16), torch.zeros(3, 9, 16)), "prefix has 3 heads"),
        ("prefix", (torch.zeros(2, 9, 8), torch.zeros(2, 9, 16)), "the prefix's key has shape"),
        ("suffix", (torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16)), "the suffix's key has shape"),
        ("suffix_visible", torch.ones(2, 1, 3), "suffix_visible is torch.float32"),
        ("suffix_visible", torch.ones(2, 2, 3, dtype=torch.bool), "suffix_visible has shape"),
        ("prefix_visible", torch.ones(1, 9, dtype=torch.bool), "prefix_visible has shape"),
        ("prefix_bias", torch.ones(2, 8), "prefix_bias has shape"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    given = case((2, 4, 2, 1, 16, 9, 3), torch.float32, torch.device("cpu"))
    with pytest.raises((TypeError, ValueError), match=message):
        shared_prefix(**given | {name: value})
