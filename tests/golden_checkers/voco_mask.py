"""VoCo-LLaMA: who sees whom behind compression tokens."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.compression_base import compressed_mask


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the mask row by row; rows of padding mean nothing."""
    for row, roles in enumerate(str(text) for text in case["roles"]):
        kinds = np.array(list(roles))
        assert ((kinds == "c") == case["is_voco"][row]).all()
        assert ((kinds == ".") == case["is_pad"][row]).all()
        visual = torch.from_numpy((kinds == "v").nonzero()[0])
        text = torch.from_numpy((~np.isin(kinds, ["v", "."])).nonzero()[0])
        marked = torch.from_numpy(case["is_voco"][row].nonzero()[0])
        media = [visual] if visual.numel() else []
        hidden = get("voco").method(hide_prefix="all").hidden(media, text, marked)
        mask = compressed_mask(torch.from_numpy(~case["is_pad"][row]), hidden).numpy()
        valid = case["row_valid"][row]
        np.testing.assert_array_equal(mask[valid], case["allowed"][row][valid])
