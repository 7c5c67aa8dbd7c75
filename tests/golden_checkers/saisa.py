"""SAISA: the mask in which visual tokens never look."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.in_llm.saisa import naavit_mask


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the mask."""
    visual = torch.zeros(int(case["seq_len"]), dtype=torch.bool)
    start = int(case["image_start"])
    visual[start : start + int(case["image_len"])] = True
    mask = naavit_mask(visual)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask[None, None].numpy(), case["mask"])
