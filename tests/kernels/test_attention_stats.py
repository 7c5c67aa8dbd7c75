"""Slices of attention: plain torch against the whole matrix in float64, Triton against plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast import kernels
from mmfast.kernels import attention_stats
from mmfast.kernels.attention_stats import attend, column_sums, few_rows, reference, row_lse, visual_mass
from mmfast.token_pruning.attention import AttentionView

CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
REDUCTIONS = list(itertools.product(("none", "mean", "max"), ("sum", "max")))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    rows: int = 7,
    columns: int = 11,
    width: int = 12,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Queries that look sharply, and keys."""
    return 2.0 * random(batch, heads, rows, width, seed=1, dtype=dtype), random(
        batch, groups, columns, width, seed=2, dtype=dtype
    )


def options(kind: str, query: Tensor, key: Tensor) -> dict[str, Any]:
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    valid = torch.arange(columns) >= torch.arange(batch)[:, None] * 2
    spread = torch.linspace(0, columns - 1, rows).long()
    seen = random(1, heads, rows, columns, seed=3) > -0.5
    seen[:, :, 0] = False
    added = random(batch, 1, rows, columns, seed=4)
    added[0, 0, -1] = torch.finfo(torch.float32).min
    added[..., 1] = -torch.inf
    return {
        "causal": {},
        "open": {"causal": False, "scaling": 0.5},
        "window": {"window": 3, "softcap": 2.0},
        "padded": {"valid": valid},
        "placed": {"places": spread, "window": 4, "valid": valid},
        "packed": {"packed": torch.tensor([0, columns // 3, columns // 3 + 1, columns]), "causal": False},
        "bool": {"mask": seen, "causal": False, "temperature": 0.3},
        "added": {"mask": added, "temperature": 2.0, "softcap": 3.0},
    }[kind]


KINDS = ["causal", "open", "window", "padded", "placed", "packed", "bool", "added"]


def dense(query: Tensor, key: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The textbook, one row at a time: log-sum-exps ``[B, H, R]`` and probabilities ``[B, H, R, m]`` in float64."""
    batch, heads, rows, width = query.shape
    columns = key.shape[2]
    places = given.get("places")
    places = torch.arange(columns - rows, columns) if places is None else places
    places = places.expand(batch, rows)
    prompt = torch.zeros(columns).long()
    for edge in given.get("packed", [])[1:-1]:
        prompt[edge:] += 1
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=torch.float64)
    found = torch.zeros(batch, heads, rows, columns, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        own = key[b, h // (heads // key.shape[1])].double() @ query[b, h, i].double()
        own = own * given.get("scaling", width**-0.5)
        if given.get("softcap"):
            own = given["softcap"] * torch.tanh(own / given["softcap"])
        sees = [
            not (
                (given.get("causal", True) and j > places[b, i])
                or ("window" in given and j <= places[b, i] - given["window"])
                or ("valid" in given and not given["valid"][b, j])
                or prompt[j] != prompt[places[b, i]]
            )
            for j in range(columns)
        ]
        visible = torch.tensor(sees)
        if "mask" in given:
            row = given["mask"].expand(batch, heads, rows, columns)[b, h, i]
            if row.dtype == torch.bool:
                visible &= row
            else:
                visible &= row > -1e38
                own = own + row.double()
        if visible.any():
            own = (own / given.get("temperature", 1.0))[visible]
            lse[b, h, i] = own.logsumexp(0)
            found[b, h, i, visible] = own.softmax(0)
    return lse, found


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    assert torch.equal(found.isinf(), wanted.isinf())
    found, wanted = found.masked_fill(found.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0)
    assert bool(found.isfinite().all())
    if wanted.numel():
        assert (found - wanted).abs().max() <= CLOSE[dtype] * max(1.0, float(wanted.abs().max()))


def reduce(whole: Tensor, weights: Tensor, heads: str, over: str) -> Tensor:
    """Written out: heads entry by entry, then rows."""
    block = {"none": lambda: whole, "mean": lambda: whole.mean(1), "max": lambda: whole.amax(1)}[heads]()
    weights = weights if weights.ndim == 3 or heads != "none" else weights[..., None, :]
    weighed = block * weights.double()[..., None]
    return weighed.sum(-2) if over == "sum" else weighed.amax(-2).clamp_min(0)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_textbook(kind: str) -> None:
    query, key = case()
    given = options(kind, query, key)
    lse, whole = dense(query, key, **given)
    value = random(2, 2, 11, 5, seed=5)
    with kernels.use("torch"):
        near(row_lse(query, key, **given), lse)
        found = attend(query, key, value, **given)
        near(found.lse, lse)
        near(found.output, whole @ value.double().repeat_interleave(2, dim=1))
        assert found.mass is None
        near(few_rows(query, key, first=2, **given), whole[..., 2:])
        near(few_rows(query, key, lse.float(), **given), whole)
        visual = torch.arange(11) % 3 == 0
        near(visual_mass(query, key, visual, **given), whole[..., visual].sum(-1))
        assert torch.equal(attend(query, key, value, visual, **given).mass, visual_mass(query, key, visual, **given))
        for heads, over in REDUCTIONS:
            for weights in (None, random(7, seed=6), random(2, 7, seed=7).relu()):
                own = torch.ones(2, 7) if weights is None else weights.expand(2, 7)
                wanted = reduce(whole, own, heads, over)
                near(column_sums(query, key, None, weights, heads=heads, over=over, **given), wanted)
                near(
                    column_sums(query, key, lse.float(), weights, heads=heads, over=over, first=3, **given),
                    wanted[..., 3:],
                )
        each = random(2, 4, 7, seed=8)
        near(column_sums(query, key, None, each, **given), reduce(whole, each, "none", "sum"))


def test_a_batch_is_its_prompts_one_by_one() -> None:
    query, key = case(batch=3, rows=9, columns=9)
    lengths = [9, 4, 1]
    valid = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    with kernels.use("torch"):
        together = column_sums(query, key, None, valid.float(), heads="max", valid=valid)
        for row, length in enumerate(lengths):
            alone = column_sums(query[row, None, :, -length:], key[row, None, :, -length:], heads="max")
            near(together[row, None, -length:], alone)
            assert not together[row, : 9 - length].any()


def test_packed_prompts_are_prompts_one_by_one() -> None:
    query, key = case(batch=1, rows=9, columns=9)
    edges = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    with kernels.use("torch"):
        together = column_sums(query, key, heads="max", packed=edges)
        for begin, end in itertools.pairwise(edges.tolist()):
            near(together[:, begin:end], column_sums(query[:, :, begin:end], key[:, :, begin:end], heads="max"))


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = case()
    with kernels.use("torch"):
        whole = column_sums(query, key, heads="max"), row_lse(query, key)
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 4 * 11 * 2)
        near(column_sums(query, key, heads="max"), whole[0])
        near(row_lse(query, key), whole[1])


def test_a_gradient_flows_through_plain_torch() -> None:
    query, key = (tensor.requires_grad_() for tensor in case(rows=4, columns=4))
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    column_sums(query, key, heads="mean", valid=valid)[:, 1].sum().backward()
    assert key.grad is not None
    assert bool(key.grad.isfinite().all())
    assert bool(key.grad.any())


def wrong() -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    query, key = case()
    return {
        "ndim": (lambda: row_lse(query[0], key), ValueError, "must be"),
        "groups": (lambda: row_lse(query, key[:, :1].expand(-1, 3, -1, -1)), ValueError, "divides 4 query heads"),
        "dtype": (lambda: row_lse(query, key.half()), TypeError, "one floating dtype"),
        "temperature": (lambda: row_lse(query, key, temperature=0.0), ValueError, "temperature=0.0"),
        "softcap": (lambda: row_lse(query, key, softcap=-1.0), ValueError, "softcap=-1.0"),
        "window": (lambda: row_lse(query, key, window=0), ValueError, "window=0"),
        "places": (lambda: row_lse(query, key, places=torch.arange(3)), ValueError, r"places \[3\]"),
        "places dtype": (lambda: row_lse(query, key, places=torch.zeros(7)), TypeError, "int64"),
        "valid": (lambda: row_lse(query, key, valid=torch.ones(2, 11)), TypeError, "bool"),
        "packed": (
            lambda: row_lse(query, key, packed=torch.tensor([0, 3])),
            ValueError,
            r"packed=\[0, 3\] must ascend",
        ),
        "packed shape": (lambda: row_lse(query, key, packed=torch.tensor([11])), ValueError, r"packed \[1\]"),
        "packed dtype": (lambda: row_lse(query, key, packed=torch.zeros(2)), TypeError, "packed is torch.float32"),
        "mask": (lambda: row_lse(query, key, mask=torch.ones(2, 4, 7, 3)), ValueError, "mask"),
        "mask dtype": (lambda: row_lse(query, key, mask=torch.ones(1, dtype=torch.int64)), TypeError, "mask"),
        "value": (lambda: attend(query, key, key[:, :, :3]), ValueError, "value"),
        "heads": (lambda: column_sums(query, key, heads="all"), ValueError, "heads='all'"),  # type: ignore[arg-type]
        "over": (lambda: column_sums(query, key, over="mean"), ValueError, "over='mean'"),  # type: ignore[arg-type]
        "weights": (lambda: column_sums(query, key, None, torch.ones(3)), ValueError, "weights"),
        "per head": (lambda: column_sums(query, key, None, torch.ones(2, 4, 7), heads="mean"), ValueError, "each head"),
        "lse": (lambda: few_rows(query, key, torch.zeros(2, 4, 6)), ValueError, "lse"),
        "first": (lambda: few_rows(query, key, first=12), ValueError, "first=12"),
        "visual": (lambda: visual_mass(query, key, torch.ones(11)), TypeError, "bool"),
        "visual size": (lambda: visual_mass(query, key, torch.ones(3, dtype=torch.bool)), ValueError, "visual"),
    }


@pytest.mark.parametrize("name", wrong())
def test_wrong_arguments_are_named(name: str) -> None:
    call, error, message = wrong()[name]
    with pytest.raises(error, match=message):
        call()


def test_a_head_too_wide_runs_in_torch() -> None:
    assert "512" in attention_stats.refusal(width=512)
    states = torch.zeros(1, 1, 2, 512)
    assert row_lse(states, states).exp().tolist()[0][0][1] == pytest.approx(2.0)


def test_no_rows_and_no_columns() -> None:
    query, key = case(rows=0)
    assert row_lse(query, key).shape == (2, 4, 0)
    assert column_sums(query, key, heads="max").tolist() == [[0.0] * 11] * 2
    query, key = case()
    assert few_rows(query, key[:, :, :0]).shape == (2, 4, 7, 0)
    assert row_lse(query, key[:, :, :0], causal=False).isneginf().all()


def both(call: Callable[[], Any], dtype: torch.dtype) -> None:
    with kernels.use("torch"):
        wanted = call()
    with kernels.use("triton"):
        found = call()
    for own, other in zip(*((part,) if isinstance(part, Tensor) else part for part in (found, wanted)), strict=True):
        if other is None:
            assert own is None
            continue
        assert own.dtype == other.dtype
        near(own, other, dtype)


def all_slices(query: Tensor, key: Tensor, dtype: torch.dtype, **given: Any) -> None:
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    value = random(*key.shape[:3], 20, seed=9, dtype=dtype).to(query.device)
    weights = (random(batch, rows, seed=10).relu() * (torch.arange(rows) % 5 != 0)).to(query.device)
    visual = (torch.arange(columns) % 3 == 1).to(query.device)
    both(lambda: attend(query, key, value, visual, **given), dtype)
    both(lambda: row_lse(query, key, **given), dtype)
    both(lambda: visual_mass(query, key, visual, **given), dtype)
    both(lambda: few_rows(query, key, first=min(3, columns), **given), dtype)
    with kernels.use("torch"):
        lse = row_lse(query, key, **given)
    for reduction, over in REDUCTIONS:
        both(lambda r=reduction, o=over: column_sums(query, key, lse, weights, heads=r, over=o, **given), dtype)
    each = random(batch, heads, rows, seed=11).to(query.device)
    both(lambda: column_sums(query, key, None, each, first=columns // 2, **given), dtype)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop turns more than once."""
    from mmfast.kernels.attention_stats import tiles, triton_backward

    for module, name in ((tiles, "TILES"), (triton_backward, "TILES_BACK")):
        monkeypatch.setattr(module, name, dict.fromkeys((128, 256, 512, 1024), (16, 16, 4, 1)))


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("open", "window", "padded"))) for kind in KINDS]
)
def test_triton_is_the_reference(kind: str, device: torch.device) -> None:
    query, key = case(rows=18, columns=35, width=20)
    given = moved(options(kind, query, key), device)
    all_slices(query.to(device), key.to(device), torch.float32, **given)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "columns", "width"), [(2, 1, 63, 63, 60), (3, 3, 1, 70, 100), (6, 2, 1, 1, 16)]
)
def test_odd_sizes(
    dtype: torch.dtype, heads: int, groups: int, rows: int, columns: int, width: int, device: torch.device
) -> None:
    query, key = case(1, heads, groups, rows, columns, width, dtype)
    all_slices(query.to(device), key.to(device), dtype)


@pytest.mark.interpreter
def test_strided_inputs(device: torch.device) -> None:
    query = random(2, 9, 4, 16).transpose(1, 2).to(device)
    key = random(2, 16, 2, 9, seed=1).permute(0, 2, 3, 1).to(device)
    mask = (random(2, 1, 9, 9, seed=2) > -1).transpose(2, 3).to(device)
    all_slices(query, key, torch.float32, mask=mask)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["causal", "bool", "added"])
def test_a_view_reads_the_same(kind: str, device: torch.device) -> None:
    query, key = (part[0].to(device) for part in case(rows=9, columns=14))
    mask = None if kind == "causal" else (random(9, 14, seed=3) > -0.5).to(device)
    if mask is not None:
        # A row sees itself.
        mask[range(9), range(5, 14)] = True
        mask = mask if kind == "bool" else torch.where(mask, 0.5, torch.finfo(torch.float32).min).expand(4, -1, -1)
    silent = (torch.arange(9) % 4 == 1).to(device)
    view = AttentionView(query, key, None, 0.4, 3.0, mask, silent)
    rows = torch.tensor([8, 1, 2], device=device)
    both(lambda: view.rows(rows, temperature=0.5), torch.float32)
    weights = random(4, 9, seed=5).to(device)
    both(lambda: view.column_sums(weights, heads="each"), torch.float32)
    both(lambda: view.column_sums(weights[0] > 0, heads="max", temperature=0.5), torch.float32)
    both(lambda: view.column_sums(weights[0], heads="mean"), torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("splits", [2, 100])
def test_split_work_is_put_together(splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels.attention_stats import triton

    monkeypatch.setattr(triton, "_splits", lambda tensor, programs, most: min(splits, most))
    query, key = case(2, 2, 1, 35, 43, 20)
    valid = (torch.arange(43) >= torch.tensor([[0], [20]])).to(device)
    both(lambda: attend(query, key, key, valid, valid=valid, window=9), torch.float32)
    both(lambda: visual_mass(query, key, valid, valid=valid), torch.float32)
    for heads, over in (("none", "sum"), ("mean", "max")):
        both(lambda h=heads, o=over: column_sums(query, key, heads=h, over=o, window=9), torch.float32)


@pytest.mark.interpreter
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    ratio=st.integers(1, 3),
    groups=st.integers(1, 2),
    rows=st.integers(1, 20),
    past=st.integers(0, 20),
    width=st.integers(1, 20),
    window=st.none() | st.integers(1, 25),
)
def test_any_shape(
    device: torch.device, ratio: int, groups: int, rows: int, past: int, width: int, window: int | None
) -> None:
    query, key = case(1, ratio * groups, groups, rows, past + rows, width)
    query, key = query.to(device), key.to(device)
    both(lambda: few_rows(query, key, window=window), torch.float32)
    both(lambda: column_sums(query, key, heads="max", window=window), torch.float32)


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_no_tensor_grows_with_the_square_of_the_prompt(dtype: torch.dtype) -> None:
    query, key = (part.cuda() for part in case(1, 8, 2, 16384, 16384, 64, dtype))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with kernels.use("triton"):
        total = column_sums(query, key, heads="max")
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    assert bool(total.isfinite().all())
