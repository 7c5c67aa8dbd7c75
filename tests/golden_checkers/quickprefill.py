"""QuickPrefill: what stays of one group."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Retained
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare the choice."""
    keys = tensor(case, "keys")[0]
    visual = torch.ones(keys.shape[1], dtype=torch.bool)
    entries = Entries.of(keys, torch.zeros_like(keys), visual=visual)
    retained = get("quickprefill").method(keep=int(case["top_k"]))(entries) or Retained(visual)
    np.testing.assert_array_equal(retained.kept.numpy(), case["keep_mask"])
    np.testing.assert_array_equal(retained.kept.nonzero().squeeze(-1).numpy(), np.sort(case["keep_idx"]))
