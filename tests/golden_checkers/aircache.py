"""AirCache: the elite of every layer, what it attends to, what each layer gets, and what stays."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.eviction.aircache import AirCache, skewness
from support.entries import Case, rows


def check(case: Case) -> None:
    """Compare all layers of one prompt."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    keep, length = case["keep"], case["key"].shape[-2]
    method = AirCache(
        keep=int(keep) if np.issubdtype(keep.dtype, np.integer) else float(keep), alpha=float(case["alpha"])
    )
    visual = torch.zeros(length, dtype=torch.bool)
    visual[int(case["visual_start"]) : int(case["visual_end"])] = True
    # Layers stand where other cases have prompts.
    layers = [entries for _, entries in rows(case, visual)]
    elites = torch.stack([method.elite(entries) for entries in layers])
    np.testing.assert_array_equal(elites.numpy(), case["elite_mask"])
    observed = [method.observe(entries) for entries in layers]
    importance = [layer.importance for layer in observed]
    np.testing.assert_allclose(torch.stack(importance), case["importance"], **tolerance)
    np.testing.assert_allclose([float(layer.sum()) for layer in importance], case["strength"], **tolerance)
    np.testing.assert_allclose([skewness(layer) for layer in importance], case["skewness"], **tolerance)
    ratios = method.ratios(importance)
    np.testing.assert_allclose(ratios, case["layer_ratio"], **tolerance)
    total = int(visual.sum())
    assert [method.count(ratio, total) for ratio in ratios] == case["visual_kept"].tolist()
    # Where everything is to be kept the method leaves the prompt alone, whatever the ratios say.
    for layer, ratio, expected in zip(observed, ratios, case["keep_mask"], strict=True):
        np.testing.assert_array_equal(method.choose(layer, ratio).numpy(), expected)
    if method.keep_count(total) < total:
        for retained, expected in zip(method.settle(observed), case["keep_mask"], strict=True):
            mask = torch.ones(length, dtype=torch.bool) if retained is None else retained.kept
            np.testing.assert_array_equal(mask.numpy(), expected)
