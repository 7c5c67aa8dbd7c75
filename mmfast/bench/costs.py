"""How many bytes and floating point operations each operation needs at least: one formula each, in one place.

Bytes are what must be read and written once if nothing else is; operations are the additions and multiplications of
products, two to a multiply-accumulate. What a form does beyond that is its own cost, and shows as a lower rate.

Letters: B batch, N tokens, K kept, H query heads, G key/value heads, d head size, D width of features, e bytes per
value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

NODES = 32
"""Nodes of the draft tree."""
LOOSE = 32
"""Entries behind a packed or shared part of a cache."""
GROUP = 32
"""Values that share a scale and an offset in a packed cache."""
PACKED_BITS = 4


@dataclass(frozen=True)
class Size:
    """One shape an operation is measured at.

    Attributes:
        label: where it occurs.
        batch: B.
        tokens: N.
        kept: K.
        heads: H.
        groups: G.
        head_dim: d.
        width: D.
        item: e.
    """

    label: str
    batch: int
    tokens: int
    kept: int
    heads: int
    groups: int
    head_dim: int
    width: int
    item: int = 2

    @property
    def merges(self) -> int:
        """Pairs that merging joins: a third of the tokens."""
        return self.tokens // 3

    @property
    def chosen(self) -> int:
        """Entries that a step on part of a cache reads: half of them."""
        return self.tokens // 2

    @property
    def pairs(self) -> int:
        """Pairs of a row and a column it sees in causal attention."""
        return self.tokens * (self.tokens + 1) // 2

    @property
    def states(self) -> int:
        """Bytes of the query, or of the output, of all tokens."""
        return self.item * self.batch * self.heads * self.tokens * self.head_dim

    @property
    def entries(self) -> int:
        """Bytes of the keys, or of the values, of all tokens."""
        return self.item * self.batch * self.groups * self.tokens * self.head_dim

    @property
    def features(self) -> int:
        """Bytes of the features of all tokens."""
        return self.item * self.batch * self.tokens * self.width

    @property
    def row(self) -> int:
        """Bytes of the query, or of the output, of one token."""
        return self.item * self.batch * self.heads * self.head_dim

    def attention(self, rows: int, columns: int) -> int:
        """Operations of reading ``columns`` values by ``rows`` rows: two products."""
        return 4 * self.batch * self.heads * rows * columns * self.head_dim


@dataclass(frozen=True)
class Cost:
    """What an operation needs at least.

    Attributes:
        moved: bytes, for a size.
        flops: floating point operations, for a size.
    """

    moved: Callable[[Size], int]
    flops: Callable[[Size], int]


def _picks(s: Size) -> int:
    return 8 * s.batch * s.kept


def _logits(s: Size) -> int:
    return 2 * s.batch * s.heads * s.pairs * s.head_dim


def _cosines(s: Size) -> int:
    return 2 * s.batch * s.tokens**2 * s.width


COSTS: dict[str, Cost] = {
    # Output and log-sum-exp of causal attention.
    "attend": Cost(lambda s: 2 * s.states + 2 * s.entries + 4 * s.batch * s.heads * s.tokens, lambda s: 2 * _logits(s)),
    "row_lse": Cost(lambda s: s.states + s.entries + 4 * s.batch * s.heads * s.tokens, _logits),
    # Logits twice: first for the log-sum-exp of the rows, then for the sums of the columns.
    "column_sums": Cost(lambda s: s.states + s.entries + 4 * s.batch * s.tokens, lambda s: 2 * _logits(s)),
    # One row, the last of the prompt.
    "few_rows": Cost(
        lambda s: s.row + s.entries + 4 * s.batch * s.heads * s.tokens,
        lambda s: 2 * s.batch * s.heads * s.tokens * s.head_dim,
    ),
    "visual_mass": Cost(
        lambda s: s.states + s.entries + s.batch * s.tokens + 4 * s.batch * s.heads * s.tokens, _logits
    ),
    "max_min_select": Cost(lambda s: s.features + _picks(s), _cosines),
    # One row of the kernel and one of its factor per pick.
    "conditional_dpp": Cost(
        lambda s: s.features + s.item * s.batch * s.tokens + _picks(s),
        lambda s: s.batch * s.tokens * (2 * s.kept * s.width + s.kept * (s.kept - 1)),
    ),
    # The first gains; how many are computed again depends on the data.
    "greedy_cover_cosine": Cost(lambda s: s.features + _picks(s), _cosines),
    # Differences, their squares and the sums.
    "dpc_knn": Cost(
        lambda s: s.features + _picks(s) + 12 * s.batch * s.tokens, lambda s: 3 * s.batch * s.tokens**2 * s.width
    ),
    "bipartite_merge": Cost(
        lambda s: s.features + s.item * s.batch * (s.tokens - s.merges) * s.width,
        lambda s: 2 * s.batch * (s.tokens // 2) * ((s.tokens + 1) // 2) * s.width,
    ),
    # Hidden states, a mask, keys and values, each read and written.
    "compact": Cost(
        lambda s: 2 * s.batch * s.kept * (s.item * (s.width + 2 * s.groups * s.head_dim) + 1) + 8 * s.batch * s.kept,
        lambda s: 0,
    ),
    "gather_decode": Cost(
        lambda s: (
            2 * s.row + 2 * s.item * s.batch * s.groups * s.chosen * s.head_dim + 8 * s.batch * s.groups * s.chosen
        ),
        lambda s: s.attention(1, s.chosen),
    ),
    # Codes of keys and values, a scale and an offset for each group, and the loose entries.
    "quant_decode": Cost(
        lambda s: (
            2 * s.row
            + 2 * s.batch * s.groups * s.tokens * s.head_dim * PACKED_BITS // 8
            + 4 * s.entries // GROUP
            + 2 * s.item * s.batch * s.groups * LOOSE * s.head_dim
        ),
        lambda s: s.attention(1, s.tokens + LOOSE),
    ),
    # Two rotations of every pair of channels, six operations each; four float32 tables.
    "rerotate": Cost(
        lambda s: 2 * s.entries + 16 * s.tokens * s.head_dim, lambda s: 6 * s.batch * s.groups * s.tokens * s.head_dim
    ),
    # The prefix once for the whole batch.
    "shared_prefix": Cost(
        lambda s: 2 * s.row + 2 * s.entries // s.batch + 2 * s.item * s.batch * s.groups * LOOSE * s.head_dim,
        lambda s: s.attention(1, s.tokens + LOOSE),
    ),
    "tree_attention": Cost(
        lambda s: (
            2 * NODES * s.row + 2 * s.item * s.batch * s.groups * (s.tokens + NODES) * s.head_dim + s.batch * NODES**2
        ),
        lambda s: s.attention(NODES, s.tokens + NODES),
    ),
    # A causal mask, and a last sixteenth that everything before it sees too.
    "masked_rect": Cost(
        lambda s: 2 * s.states + 2 * s.entries + 4 * s.batch * s.heads * s.tokens,
        lambda s: 4 * s.batch * s.heads * (s.pairs + (s.tokens - s.tokens // 16) * (s.tokens // 16)) * s.head_dim,
    ),
}
"""Operation -> what it needs at least."""
