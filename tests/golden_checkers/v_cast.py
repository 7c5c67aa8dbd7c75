"""V-CAST: curvature, what each frame may keep, and what it keeps."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.v_cast import curvature
from mmfast.token_pruning.similarity import normalised
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the curvature and the choice, with the official counts."""
    features = torch.from_numpy(case["features"])
    frames, places, width = features.shape
    turns = curvature(normalised(features.mean(dim=1)))
    np.testing.assert_allclose(turns.numpy(), case["curvature"], atol=1e-5, rtol=1e-5)
    tokens = VisualTokens(features.reshape(-1, width), Layout.grid(1, places, frames=frames, modality="video"))
    decision = get("v_cast").method(keep=float(case["retain_ratio"]), compat="official")(tokens)
    kept = np.arange(len(tokens)) if decision is None else decision.indices.numpy()
    np.testing.assert_array_equal(kept, case["keep_idx"])
    np.testing.assert_array_equal(np.bincount(kept // places, minlength=frames), case["tokens_kept_per_frame"])
