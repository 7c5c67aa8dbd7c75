"""DyCoke's merging over time: the kept tokens in the official order and in raster order, and their number."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the choice, and the order in which features are handed on."""
    frames, places = int(case["num_frames"]), int(case["tokens_per_frame"])
    features = torch.from_numpy(case["features"])
    tokens = VisualTokens(features, Layout.grid(1, places, frames=frames, modality="video"))
    each = int((1.0 - float(case["merge_ratio"])) * places)
    method = get("dycoke").method(keep=int(case["num_out"]), compat="official")
    chosen = method.select(tokens, int(case["num_out"]))
    np.testing.assert_array_equal(chosen.numpy(), case["keep_idx_official_order"])
    assert torch.bincount(chosen // places)[1] == each
    decision = method(tokens)
    if decision is None:
        np.testing.assert_array_equal(np.arange(len(tokens)), case["keep_idx"])
        return
    np.testing.assert_array_equal(decision.indices.numpy(), case["keep_idx"])
    np.testing.assert_array_equal(decision.features.numpy(), case["features"][case["keep_idx_official_order"]])
