"""SpecPC: which tokens of the prompt stay."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from support.entries import Case


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    neighbors = int(case["neighbor_tokens"])
    method = get("spec_pc").method(
        keep=int(case["keep"]),
        kernel=int(case["kernel_size"]),
        pooling=str(case["pool_type"]),
        neighbors=None if neighbors < 0 else neighbors,
    )
    length = case["attention_per_key"].shape[-1]
    kept = min(int(case["keep"]), length)
    for received, expected in zip(case["attention_per_key"], case["keep_idx"], strict=True):
        chosen = method.chosen(torch.from_numpy(received), kept, min(int(case["window"]), kept))
        np.testing.assert_array_equal(chosen.numpy(), expected)
