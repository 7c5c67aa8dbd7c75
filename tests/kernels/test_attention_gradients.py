"""Gradients through slices of attention: plain torch against finite differences, Triton against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmfast import kernels
from mmfast.kernels.attention_stats import Options, attend, column_sums, few_rows, row_lse, visual_mass

Slice = Callable[[], Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def states(
    rows: int = 9, columns: int = 13, width: int = 5, dtype: torch.dtype = torch.float32, groups: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of as many prompts as there are key heads, each of which two heads share."""
    return (
        2.0 * random(groups, 2 * groups, rows, width, seed=1, dtype=dtype),
        random(groups, groups, columns, width, seed=2, dtype=dtype),
        random(groups, groups, columns, 3, seed=3, dtype=dtype),
    )


def options(kind: str, rows: int = 9, columns: int = 13) -> Options:
    valid = torch.arange(columns) >= torch.tensor([[0], [columns // 2 + 3]])
    return {
        "causal": Options(),
        "open": Options(causal=False, scaling=0.5, softcap=3.0),
        # Rows of the second prompt that see padding alone see nothing.
        "padded": Options(valid=valid, window=4, temperature=0.7),
        "placed": Options(places=torch.arange(rows).flip(0) + 1, softcap=2.0),
        "packed": Options(packed=torch.tensor([0, 6, 7, columns])),
    }[kind]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def pulled(found: Tensor, seed: int = 7) -> Tensor:
    """A sum with weights that differ, of what is finite."""
    return (found.masked_fill(found.isneginf(), 0.0) * random(*found.shape, seed=seed).to(found)).sum()


def slices(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, given: Options) -> dict[str, Slice]:
    visual = torch.arange(key.shape[2], device=key.device) % 3 == 1

    def everything() -> Tensor:
        found = attend(query, key, value, visual, **given)
        return pulled(found.output) + pulled(found.lse, 5) + pulled(found.mass, 6)

    def few(kept: bool) -> Tensor:
        lse = row_lse(query, key, **given) if kept else None
        return pulled(few_rows(query, key, lse, first=min(2, key.shape[2] - 1), **given))

    def sums(heads: str, over: str = "sum", first: int = 0) -> Tensor:
        each = weights[:, None] * random(1, query.shape[1], 1, seed=8).to(weights)
        # Log-sum-exps that were kept have a gradient of their own.
        lse = row_lse(query, key, **given) if heads == "mean" else None
        own = each if heads == "none" else weights
        return pulled(column_sums(query, key, lse, own, heads=heads, over=over, first=first, **given))  # type: ignore[arg-type]

    return {
        "lse": lambda: pulled(row_lse(query, key, **given)),
        "all": everything,
        "mass": lambda: pulled(visual_mass(query, key, visual, **given)),
        "few": lambda: few(False),
        "few, kept": lambda: few(True),
        "each": lambda: sums("none", first=min(1, key.shape[2] - 1)),
        "largest of each": lambda: sums("none", "max"),
        "mean": lambda: sums("mean"),
        "max": lambda: sums("max", first=min(2, key.shape[2] - 1)),
        "largest mean": lambda: sums("mean", "max"),
        "largest of all": lambda: sums("max", "max"),
    }


NAMES = list(slices(*states(), torch.ones(2, 9), Options()))


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_against_finite_differences(name: str) -> None:
    given = options("padded", 3, 4) | {"softcap": 4.0}
    mask = random(1, 4, 1, 4, seed=4, dtype=torch.float64)
    inputs = leaves(*states(3, 4, 2, torch.float64), torch.rand(2, 3, dtype=torch.float64) + 0.5, mask)

    def call(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, own: Tensor) -> Tensor:
        return slices(query, key, value, weights, given | {"mask": own})[name]()

    with kernels.use("torch"):
        assert torch.autograd.gradcheck(call, inputs)


def gradients(inputs: list[Tensor], given: Options, *, masked: bool) -> dict[str, list[Tensor | None]]:
    query, key, value, weights, mask = leaves(*inputs)
    found = slices(query, key, value, weights, given | {"mask": mask} if masked else given)
    return {
        name: list(torch.autograd.grad(call(), [query, key, value, weights, mask], allow_unused=True))
        for name, call in found.items()
    }


def compare(inputs: list[Tensor], given: Options, *, masked: bool = True, close: float = 2e-5) -> None:
    with kernels.use("torch"):
        wanted = gradients(inputs, given, masked=masked)
    with kernels.use("triton"):
        found = gradients(inputs, given, masked=masked)
    for name, parts in wanted.items():
        for which, own, other in zip(("query", "key", "value", "weights", "mask"), found[name], parts, strict=True):
            assert (own is None) == (other is None), (name, which)
            if own is None or other is None:
                continue
            assert own.dtype == other.dtype
            far = float((own.double() - other.double()).abs().max())
            assert far <= close * max(1.0, float(other.abs().max())), (name, which, far)


def moved(given: Options, device: torch.device) -> Options:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}  # type: ignore[return-value]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that loops turn more than once, and winners of few rows at a time."""
    from mmfast.kernels.attention_stats import functions, tiles, triton_backward

    for module, name in ((tiles, "TILES"), (triton_backward, "TILES_BACK")):
        monkeypatch.setattr(module, name, dict.fromkeys((128, 256, 512, 1024), (16, 16, 4, 1)))
    monkeypatch.setattr(functions, "BLOCK_ELEMENTS", 2 * 18 * 10)


def mask_of(kind: str, prompts: int, heads: int) -> Tensor | None:
    """Masks that are shared by different things."""
    shapes = {
        "causal": (1, heads, 1, 18),
        "open": (prompts, 1, 17, 18),
        "padded": (1, 1, 17, 1),
        "placed": (1, 1, 1, 18),
    }
    return random(*shapes[kind], seed=4) if kind in shapes else None


def check(kind: str, groups: int, device: torch.device) -> None:
    given = moved(options(kind, 17, 18), device)
    given |= {"valid": given["valid"][:groups]} if "valid" in given else {}  # type: ignore[index]
    weights = torch.rand(groups, 17, generator=torch.Generator().manual_seed(5)) * (torch.arange(17) % 4 != 2)
    mask = mask_of(kind, groups, 2 * groups)
    inputs = [*states(17, 18, groups=groups), weights, torch.zeros(1) if mask is None else mask]
    compare([part.to(device) for part in inputs], given, masked=mask is not None)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
def test_triton_is_plain_torch(device: torch.device) -> None:
    check("causal", 1, device)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["causal", "open", "padded", "placed", "packed"])
def test_triton_is_plain_torch_for_batches(kind: str, device: torch.device) -> None:
    check(kind, 2, device)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "close"),
    [
        pytest.param(torch.float16, 4e-3, marks=pytest.mark.slow, id="float16"),
        pytest.param(torch.bfloat16, 3e-2, id="bfloat16"),
    ],
)
def test_lower_precision(dtype: torch.dtype, close: float, device: torch.device) -> None:
    inputs = [part.to(device, dtype) for part in states(5, 7, 20, groups=1)]
    others = torch.rand(1, 5, device=device), torch.zeros(1, device=device)
    compare([*inputs, *others], Options(), masked=False, close=close)


@pytest.mark.interpreter
def test_one_token(device: torch.device) -> None:
    inputs = [part.to(device) for part in states(1, 1, 16, groups=1)]
    compare([*inputs, torch.ones(1, 1, device=device), torch.zeros(1, device=device)], Options(), masked=False)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    query, key, value = leaves(*states(3, 3, groups=1))
    with kernels.use("torch"):
        valid = torch.tensor([[False, True, True]])
        found = attend(query, key, value, valid=valid)
        sums = column_sums(query, key, heads="max", valid=valid)
        (found.output.sum() + found.lse[..., 1:].sum() + sums.sum()).backward()
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())
