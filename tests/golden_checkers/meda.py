"""MEDA: both entropies of every layer, and what each layer gets."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.eviction.meda import MEDA
from support.entries import Case, rows

ENTROPIES = {"all": "code", "cross_modal": "cross_modal"}


def check(case: Case) -> None:
    """Compare all layers of one prompt; the official code evicts one token later."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    keep, length = case["keep"], case["key"].shape[-2]
    visual = torch.zeros(length, dtype=torch.bool)
    visual[int(case["image_start"]) : int(case["image_end"])] = True
    later = int(case["seq_len_at_eviction"])
    for entropy, name in ENTROPIES.items():
        method = MEDA(
            keep=int(keep) if np.issubdtype(keep.dtype, np.integer) else float(keep), entropy=entropy, merge="none"
        )
        # Layers stand where other cases have prompts.
        layers = [entries for _, entries in rows(case, visual)]
        observed = [method.observe(entries) for entries in layers]
        entropies = [layer.entropy for layer in observed]
        np.testing.assert_allclose(entropies, case[f"entropy_{name}"], **tolerance)
        ratios = method.ratios(entropies, [length] * len(layers))
        np.testing.assert_allclose(ratios, case[f"layer_ratio_{name}"], **tolerance)
        if name == "code":
            halves = [method.half(ratio, later) for ratio in ratios]
            assert halves == case["heavy_per_layer_code"].tolist(), f"{halves}"
            assert halves == case["recent_per_layer_code"].tolist(), f"{halves}"
