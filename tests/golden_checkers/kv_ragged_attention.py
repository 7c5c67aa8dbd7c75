"""Attention of a few queries to what each head has kept: chosen by index, marked, and for single decode steps."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kernels.gather_decode import gather_decode
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Name the entries, mark them, and give each head only its own; the attention is the same."""
    query, key, value = (tensor(case, name) for name in ("query", "key", "value"))
    indices, counts = tensor(case, "keep_idx_padded"), tensor(case, "head_lens")
    limits = tensor(case, "query_positions").expand(query.shape[0], -1)
    named = gather_decode(query, key, value, indices=indices, counts=counts, limits=limits)
    marked = gather_decode(query, key, value, kept=tensor(case, "keep_mask"), limits=limits)
    for output, weight in (named, marked):
        np.testing.assert_allclose(output.numpy(), case["out"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(weight.numpy(), case["lse"], rtol=1e-5, atol=1e-5)
    _check_layout(case, indices, counts)


def _check_layout(case: Case, indices: torch.Tensor, counts: torch.Tensor) -> None:
    """The vectors' own books agree: flattened keys are those the indices name, head by head."""
    key, ends = tensor(case, "key"), case["cu_lens"]
    for place, (row, head) in enumerate(np.ndindex(*counts.shape)):
        own = indices[row, head, : int(counts[row, head])]
        flat = case["flat_key"][ends[place] : ends[place + 1]]
        np.testing.assert_array_equal(key[row, head, own].numpy(), flat)
