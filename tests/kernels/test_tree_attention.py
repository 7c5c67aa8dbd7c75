"""tree_attention: nodes see the cache and their ancestors, and no mask over both is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.tree_attention import tree_attention
from support.dense import assert_near, dense_attention

SHAPES = [
    # batch, heads, groups, nodes, width, cached
    (2, 4, 2, 7, 32, 63),
    (1, 6, 2, 25, 60, 150),
    (2, 2, 2, 1, 100, 33),
    (3, 4, 1, 20, 16, 0),
    (2, 4, 4, 3, 16, 1),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def ancestors(nodes: int, generator: torch.Generator) -> Tensor:
    """A random tree: each node sees what its parent sees, and itself."""
    sees = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(-1, node, (1,), generator=generator))
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


def case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
    batch, heads, groups, nodes, width, cached = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    return {
        "query": draw(batch, heads, nodes, width),
        "key": draw(batch, groups, cached + nodes, width),
        "value": draw(batch, groups, cached + nodes, width),
        "sees": torch.stack([ancestors(nodes, generator) for _ in range(batch)]).to(device),
    }


def masks(shape: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    batch, heads, groups, _, _, cached = shape
    generator = torch.Generator().manual_seed(5)
    of_rows = torch.rand(batch, cached, generator=generator) > 0.3
    of_rows[-1] = False
    of_groups = torch.rand(batch, groups, cached, generator=generator) > 0.3
    bias = torch.randn(batch, heads, cached, generator=generator).to(device)
    return [
        {},
        {"valid": of_rows.to(device), "scaling": 0.4, "softcap": 3.0},
        {"valid": of_groups.to(device), "bias": bias},
    ]


def dense(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query, (batch, heads, nodes, _) = given["query"], given["query"].shape
    cached = given["key"].shape[2] - nodes
    seen = given.get("valid", torch.ones(batch, cached, dtype=torch.bool, device=query.device))
    seen = seen[:, None] if seen.ndim == 2 else seen
    seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)[:, :, None].expand(-1, -1, nodes, -1)
    visible = torch.cat([seen, given["sees"][:, None].expand(-1, heads, -1, -1)], dim=-1)
    bias = given.get("bias")
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, nodes))[:, :, None]
    rest = {name: given.get(name) for name in ("scaling", "softcap")}
    return dense_attention(query, given["key"], given["value"], visible, bias=bias, **rest)


@by_shape
@pytest.mark.parametrize("mask", [0, 1, 2], ids=["everything", "by-row", "by-head"])
def test_apart_and_together(shape: tuple[int, ...], mask: int) -> None:
    given = case(shape, torch.float32, torch.device("cpu")) | masks(shape, torch.device("cpu"))[mask]
    with use("torch"):
        assert_near(tree_attention(**given), dense(given), torch.float32)


@settings(max_examples=25, deadline=None)
@drawn(
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    nodes=st.integers(1, 12),
    cached=st.integers(0, 30),
    seed=st.integers(0, 999),
)
def test_any_tree(groups: int, share: int, nodes: int, cached: int, seed: int) -> None:
    given = case((2, groups * share, groups, nodes, 6, cached), torch.float32, torch.device("cpu"), seed)
    with use("torch"):
        assert_near(tree_attention(**given), dense(given), torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@by_shape
def test_triton_agrees(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    # Half precision is slow to interpret: what masks do does not depend on it.
    for mask in masks(shape, device) if dtype == torch.float32 else masks(shape, device)[2:]:
        given = case(shape, dtype, device) | mask
        with use("torch"):
            wanted = tree_attention(**given)
        with use("triton"):
            found = tree_attention(**given)
        assert found[0].dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.interpreter
def test_triton_with_nodes_that_see_nothing_and_any_strides(device: torch.device) -> None:
    given = case(SHAPES[0], torch.float32, device)
    for name in ("query", "key", "value"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    # Padding of a row with a shorter draft, and a row without a cache.
    given["sees"][0, 4:] = False
    given["valid"] = torch.ones(2, 63, dtype=torch.bool, device=device)
    given["valid"][0] = False
    with use("triton"):
        output, weight = tree_attention(**given)
    assert_near((output, weight), dense(given), torch.float32)
    assert not output[0, :, 4:].any()
    assert (weight[0, :, 4:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", torch.zeros(2, 2, 2, 16), "key has 2 entries, must have at least the 3 of the query"),
        ("key", torch.zeros(2, 3, 9, 16), "key has 3 heads"),
        ("sees", torch.ones(2, 3, 3), "sees is torch.float32"),
        ("sees", torch.ones(2, 3, 4, dtype=torch.bool), "sees has shape"),
        ("valid", torch.ones(2, 9, dtype=torch.bool), "valid has shape"),
        ("valid", torch.ones(2, 3, 6, dtype=torch.bool), "valid has 3 heads"),
        ("bias", torch.ones(2, 3, 6), "bias has 3 heads"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    given = case((2, 4, 2, 3, 16, 6), torch.float32, torch.device("cpu"))
    if name == "key":
        given["value"] = value
    with pytest.raises((TypeError, ValueError), match=message):
        tree_attention(**given | {name: value})
