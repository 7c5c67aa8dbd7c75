"""Every operation of the kernels: its inputs at a size, and what else does the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmfast.bench import straightforward
from mmfast.bench.costs import GROUP, LOOSE, NODES, PACKED_BITS, Size
from mmfast.kernels import use
from mmfast.kernels.attention_stats import attend, column_sums, few_rows, row_lse, visual_mass
from mmfast.kernels.bipartite_merge import bipartite_merge
from mmfast.kernels.compact import compact
from mmfast.kernels.conditional_dpp import conditional_dpp
from mmfast.kernels.dpc_knn import dpc_knn
from mmfast.kernels.gather_decode import gather_decode
from mmfast.kernels.greedy_cover import greedy_cover_cosine
from mmfast.kernels.masked_rect import masked_rect
from mmfast.kernels.max_min_select import max_min_select
from mmfast.kernels.quant_decode import Codes, quant_decode
from mmfast.kernels.rerotate import rerotate
from mmfast.kernels.shared_prefix import shared_prefix
from mmfast.kernels.tree_attention import tree_attention

Run = Callable[[], Any]
LEVELS = 1 << PACKED_BITS


class Draw:
    """Draw inputs on a device.

    Args:
        size: of what.
        device: where.
        dtype: of floating numbers.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(*shape, generator=self._generator, device=self.device).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 numbers in [0, 1)."""
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def query(self, rows: int) -> Tensor:
        """Draw ``[B, H, rows, d]``."""
        return self.normal(self.size.batch, self.size.heads, rows, self.size.head_dim)

    def entries(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Draw keys and values ``[B, G, tokens, d]``."""
        shape = self.size.batch, self.size.groups, tokens, self.size.head_dim
        return self.normal(*shape), self.normal(*shape)

    def features(self) -> Tensor:
        """Draw ``[B, N, D]``."""
        return self.normal(self.size.batch, self.size.tokens, self.size.width)

    def chosen(self, count: int, rows: int) -> Tensor:
        """Draw ``count`` ascending places of N, ``[B, rows, count]``."""
        order = self.uniform(self.size.batch, rows, self.size.tokens).argsort(dim=-1)
        return order[..., :count].sort(dim=-1).values


@dataclass(frozen=True)
class Operation:
    """One operation as it is measured.

    Attributes:
        prepare: draws inputs and returns the call of the operation, and others that do the same.
        baseline: the name among those others against which ratios are taken.
        on_features: its size is that of features; otherwise that of attention.
    """

    prepare: Callable[[Draw], tuple[Run, dict[str, Run]]]
    baseline: str
    on_features: bool = False

    def sides(self, draw: Draw) -> dict[str, Run]:
        """Return what is run: both forms of the operation, and the others."""
        run, others = self.prepare(draw)
        return {"triton": _in("triton", run), "torch": _in("torch", run), **others}


def _in(backend: Any, run: Run) -> Run:
    def form() -> Any:
        with use(backend):
            return run()

    return form


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **options)


def _prefill(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return (draw.query(draw.size.tokens), *draw.entries(draw.size.tokens))


def _attend(draw: Draw) -> tuple[Run, dict[str, Run]]:
    states = _prefill(draw)
    return lambda: attend(*states), {
        "sdpa": lambda: _sdpa(*states, is_causal=True),
        "attention read": lambda: straightforward.read_attention(*states),
    }


def _row_lse(draw: Draw) -> tuple[Run, dict[str, Run]]:
    query, key, value = _prefill(draw)
    return lambda: row_lse(query, key), {"sdpa": lambda: _sdpa(query, key, value, is_causal=True)}


def _column_sums(draw: Draw) -> tuple[Run, dict[str, Run]]:
    query, key, value = _prefill(draw)

    def both() -> tuple[Tensor, Tensor]:
        found = attend(query, key, value)
        return found.output, column_sums(query, key, found.lse, heads="mean")

    return lambda: column_sums(query, key, heads="mean"), {
        "sdpa": lambda: _sdpa(query, key, value, is_causal=True),
        "attend and column sums": both,
        "attention read": lambda: straightforward.read_attention(query, key, value)[1].mean(dim=1).sum(dim=1),
    }


def _few_rows(draw: Draw) -> tuple[Run, dict[str, Run]]:
    query, key, value = _prefill(draw)
    last = query[:, :, -1:]

    def both() -> Tensor:
        _sdpa(query, key, value, is_causal=True)
        return few_rows(last, key)

    return lambda: few_rows(last, key), {
        "sdpa": lambda: _sdpa(query, key, value, is_causal=True),
        "sdpa and few rows": both,
        "attention read": lambda: straightforward.read_attention(query, key, value)[1][:, :, -1:],
    }


def _visual_mass(draw: Draw) -> tuple[Run, dict[str, Run]]:
    query, key, value = _prefill(draw)
    visual = torch.arange(draw.size.tokens, device=draw.device) < draw.size.tokens // 2
    return lambda: visual_mass(query, key, visual), {
        "sdpa": lambda: _sdpa(query, key, value, is_causal=True),
        "attention read": lambda: straightforward.read_attention(query, key, value)[1][..., visual].sum(dim=-1),
    }


def _max_min_select(draw: Draw) -> tuple[Run, dict[str, Run]]:
    features, kept = draw.features(), draw.size.kept
    return lambda: max_min_select(features, kept), {"loop": lambda: straightforward.max_min_select(features, kept)}


def _conditional_dpp(draw: Draw) -> tuple[Run, dict[str, Run]]:
    features, kept = draw.features(), draw.size.kept
    relevance = draw.uniform(*features.shape[:2]) + 0.5
    return lambda: conditional_dpp(features, relevance, kept), {
        "loop": lambda: straightforward.conditional_dpp(features, relevance, kept)
    }


def _greedy_cover_cosine(draw: Draw) -> tuple[Run, dict[str, Run]]:
    features, kept = draw.features(), draw.size.kept
    return lambda: greedy_cover_cosine(features, kept), {
        "loop": lambda: straightforward.greedy_cover_cosine(features, kept)
    }


def _dpc_knn(draw: Draw) -> tuple[Run, dict[str, Run]]:
    features, kept = draw.features(), draw.size.kept
    return lambda: dpc_knn(features, kept), {"loop": lambda: straightforward.dpc_knn(features, kept)}


def _bipartite_merge(draw: Draw) -> tuple[Run, dict[str, Run]]:
    features, merges = draw.features(), draw.size.merges
    return lambda: bipartite_merge(features, merges), {
        "loop": lambda: straightforward.bipartite_merge(features, merges)
    }


def _compact(draw: Draw) -> tuple[Run, dict[str, Run]]:
    states, (key, value) = draw.features(), draw.entries(draw.size.tokens)
    mask = draw.uniform(*states.shape[:2]) > 0.1
    indices = draw.chosen(draw.size.kept, 1)[:, 0]

    def gathered() -> list[Tensor]:
        rows, wide = indices[:, :, None], indices[:, None, :, None]
        return [
            states.gather(1, rows.expand(-1, -1, states.shape[-1])),
            mask.gather(1, indices),
            *(part.gather(2, wide.expand(-1, part.shape[1], -1, part.shape[3])) for part in (key, value)),
        ]

    return lambda: compact(indices, [states, mask, key, value]), {"gather": gathered}


def _gather_decode(draw: Draw) -> tuple[Run, dict[str, Run]]:
    query, (key, value) = draw.query(1), draw.entries(draw.size.tokens)
    indices = draw.chosen(draw.size.chosen, draw.size.groups)

    def gathered() -> Tensor:
        rows = indices[..., None].expand(-1, -1, -1, key.shape[-1])
        return _sdpa(query, key.gather(2, rows), value.gather(2, rows))

    return lambda: gather_decode(query, key, value, indices=indices), {
        "gather and sdpa": gathered,
        "sdpa on all entries": lambda: _sdpa(query, key, value),
    }


def _quant_decode(draw: Draw) -> tuple[Run, dict[str, Run]]:
    size, query, (loose_key, loose_value) = draw.size, draw.query(1), draw.entries(LOOSE)
    batch, groups, tokens, width = size.batch, size.groups, size.tokens, size.head_dim
    digits = 32 // PACKED_BITS

    def codes(axis: int, *packed: int) -> Codes:
        words = torch.randint(-(2**31), 2**31 - 1, (batch, groups, *packed), dtype=torch.int32, device=draw.device)
        grouped = (tokens // GROUP, width) if axis == 2 else (tokens, width // GROUP)
        scale = (draw.uniform(batch, groups, *grouped) / LEVELS).to(draw.dtype)
        length = tokens if axis == 2 else width
        return Codes(words, scale, draw.normal(batch, groups, *grouped), LEVELS, axis, length)

    key, value = codes(2, tokens // digits, width), codes(3, tokens, width // digits)
    plain_key, plain_value = draw.entries(tokens + LOOSE)

    def restored() -> Tensor:
        keys, values = torch.cat([key.restore(), loose_key], 2), torch.cat([value.restore(), loose_value], 2)
        return _sdpa(query, keys, values)

    return lambda: quant_decode(query, key, value, loose_key, loose_value), {
        "restore and sdpa": restored,
        "sdpa on numbers": lambda: _sdpa(query, plain_key, plain_value),
    }


def _tables(draw: Draw, shift: int) -> tuple[Tensor, Tensor]:
    width = draw.size.head_dim
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=draw.device) / width)
    angles = (torch.arange(draw.size.tokens, device=draw.device) + shift)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rerotate(draw: Draw) -> tuple[Run, dict[str, Run]]:
    keys, (old, new) = draw.entries(draw.size.tokens)[0], (_tables(draw, shift) for shift in (7, 0))

    def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = states.shape[-1] // 2
        return states * cos + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sin

    def two_steps() -> Tensor:
        return turned(turned(keys.float(), old[0], -old[1]), *new).to(keys.dtype)

    return lambda: rerotate(keys, old, new), {"turn back and on": two_steps}


def _shared_prefix(draw: Draw) -> tuple[Run, dict[str, Run]]:
    size, query, suffix = draw.size, draw.query(1), draw.entries(LOOSE)
    shape = size.groups, size.tokens, size.head_dim
    prefix = draw.normal(*shape), draw.normal(*shape)
    visible = torch.ones(size.batch, 1, LOOSE, dtype=torch.bool, device=draw.device)
    # What a batch of separate caches holds: the prefix once for each sequence.
    wholes = [
        torch.cat([part.expand(size.batch, *shape), own], dim=2) for part, own in zip(prefix, suffix, strict=True)
    ]
    return lambda: shared_prefix(query, prefix, suffix, visible), {
        "sdpa on separate caches": lambda: _sdpa(query, wholes[0], wholes[1])
    }


def _tree_attention(draw: Draw) -> tuple[Run, dict[str, Run]]:
    size, query, (key, value) = draw.size, draw.query(NODES), draw.entries(draw.size.tokens + NODES)
    # Each node's parent is the one at half its place: a binary tree.
    sees = torch.eye(NODES, dtype=torch.bool)
    for node in range(1, NODES):
        sees[node] |= sees[(node - 1) // 2]
    sees = sees.to(draw.device).expand(size.batch, -1, -1)
    before = torch.ones(size.batch, NODES, size.tokens, dtype=torch.bool, device=draw.device)

    def masked() -> Tensor:
        return _sdpa(query, key, value, attn_mask=torch.cat([before, sees], dim=-1)[:, None])

    return lambda: tree_attention(query, key, value, sees), {"sdpa with a mask": masked}


def _masked_rect(draw: Draw) -> tuple[Run, dict[str, Run]]:
    states, tokens = _prefill(draw), draw.size.tokens
    first = tokens - tokens // 16
    rules = torch.tensor([[0, tokens, 0, tokens, 1], [0, first, first, tokens, 0]], device=draw.device)

    def masked() -> Tensor:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=draw.device).tril()
        mask[:first, first:] = True
        return _sdpa(*states, attn_mask=mask)

    return lambda: masked_rect(*states, rules), {"sdpa with a mask": masked}


OPERATIONS: dict[str, Operation] = {
    "column_sums": Operation(_column_sums, "sdpa"),
    "few_rows": Operation(_few_rows, "sdpa"),
    "max_min_select": Operation(_max_min_select, "loop", on_features=True),
    "gather_decode": Operation(_gather_decode, "gather and sdpa"),
    "quant_decode": Operation(_quant_decode, "restore and sdpa"),
    "attend": Operation(_attend, "sdpa"),
    "row_lse": Operation(_row_lse, "sdpa"),
    "visual_mass": Operation(_visual_mass, "attention read"),
    "conditional_dpp": Operation(_conditional_dpp, "loop", on_features=True),
    "greedy_cover_cosine": Operation(_greedy_cover_cosine, "loop", on_features=True),
    "dpc_knn": Operation(_dpc_knn, "loop", on_features=True),
    "bipartite_merge": Operation(_bipartite_merge, "loop", on_features=True),
    "compact": Operation(_compact, "gather"),
    "rerotate": Operation(_rerotate, "turn back and on"),
    "shared_prefix": Operation(_shared_prefix, "sdpa on separate caches"),
    "tree_attention": Operation(_tree_attention, "sdpa with a mask"),
    "masked_rect": Operation(_masked_rect, "sdpa with a mask"),
}
"""Operation -> how it is measured; those of the goals first."""
