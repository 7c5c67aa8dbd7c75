"""LLaVA-Scissor: numbers of components and features in the official order."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Components are exact here; the vectors come from official runs that sampled every node."""
    video = torch.from_numpy(case["features"])
    frames, each, _ = video.shape
    tokens = VisualTokens(video.flatten(0, 1), Layout.grid(1, each, frames=frames, modality="video"))
    method = get("llava_scissor").method(threshold=float(case["tau"]), compat="official")
    counts = method.component_counts(tokens)
    np.testing.assert_array_equal(counts, [case["num_after_spatial"], case["num_after_temporal"]])
    assert method.own_count(tokens) == counts[1]
    features = method.merge(tokens, counts[1]).features
    np.testing.assert_allclose(features.numpy(), case["out_features"], atol=1e-4, rtol=1e-4)
