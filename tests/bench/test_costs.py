"""Bytes and operations, held against numbers worked out by hand."""

from __future__ import annotations

import pytest

from mmfast.bench.costs import COSTS, Size
from mmfast.bench.operations import OPERATIONS

# B=2, N=64, K=8, H=4, G=2, d=32, D=48, two bytes a value.
SIZE = Size("by hand", 2, 64, 8, 4, 2, 32, 48, 2)
QUERY = 2 * 2 * 4 * 64 * 32  # 32,768: the states of all query heads
KEYS = 2 * 2 * 2 * 64 * 32  # 16,384: keys of all entries
ROW = 2 * 2 * 4 * 32  # 512: the query of one token
PAIRS = 2080  # 64 * 65 / 2

BY_HAND = {
    # operation: (bytes, operations)
    "attend": (2 * QUERY + 2 * KEYS + 2048, 4 * 2 * 4 * PAIRS * 32),
    "row_lse": (QUERY + KEYS + 2048, 2 * 2 * 4 * PAIRS * 32),
    "column_sums": (QUERY + KEYS + 512, 4 * 2 * 4 * PAIRS * 32),
    "few_rows": (ROW + KEYS + 2048, 2 * 2 * 4 * 64 * 32),
    "visual_mass": (QUERY + KEYS + 128 + 2048, 2 * 2 * 4 * PAIRS * 32),
    "max_min_select": (12_288 + 128, 2 * 2 * 4096 * 48),
    "conditional_dpp": (12_288 + 256 + 128, 2 * 64 * (2 * 8 * 48 + 56)),
    "greedy_cover_cosine": (12_288 + 128, 2 * 2 * 4096 * 48),
    "dpc_knn": (12_288 + 128 + 1536, 3 * 2 * 4096 * 48),
    # 21 of 64 are merged away, and 43 written.
    "bipartite_merge": (12_288 + 2 * 2 * 43 * 48, 2 * 2 * 32 * 32 * 48),
    # 16 tokens of 2 * (48 + 128) bytes and one of the mask, read and written, and an index each.
    "compact": (2 * 16 * (352 + 1) + 128, 0),
    # 32 entries each for 2 heads of 2 rows, keys and values, and an index each.
    "gather_decode": (2 * ROW + 2 * 2 * 2 * 2 * 32 * 32 + 8 * 2 * 2 * 32, 4 * 2 * 4 * 32 * 32),
    # 8,192 codes of 4 bits for keys and as many for values, 4 * 256 factors, 2 * 32 loose entries.
    "quant_decode": (2 * ROW + 8192 + 2 * 1024 + 2 * 2 * 2 * 2 * 32 * 32, 4 * 2 * 4 * 96 * 32),
    "rerotate": (2 * KEYS + 4 * 4 * 64 * 32, 6 * 2 * 2 * 64 * 32),
    "shared_prefix": (2 * ROW + 2 * 2 * 2 * 64 * 32 + 2 * 2 * 2 * 2 * 32 * 32, 4 * 2 * 4 * 96 * 32),
    "tree_attention": (2 * 32 * ROW + 2 * 2 * 2 * 2 * 96 * 32 + 2 * 1024, 4 * 2 * 4 * 32 * 96 * 32),
    # 60 rows see the last 4 columns too.
    "masked_rect": (2 * QUERY + 2 * KEYS + 2048, 4 * 2 * 4 * (PAIRS + 240) * 32),
}


def test_every_operation_is_counted_and_measured() -> None:
    assert COSTS.keys() == OPERATIONS.keys() == BY_HAND.keys()


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_worked_out_by_hand(name: str) -> None:
    assert (COSTS[name].moved(SIZE), COSTS[name].flops(SIZE)) == BY_HAND[name]
