"""STTM: blocks, what they cover and their features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare both the blocks and what the method returns."""
    video = torch.from_numpy(case["features"]).permute(0, 2, 3, 1)
    frames, height, width, _ = video.shape
    temporal = float(case["temporal_threshold"])
    method = get("sttm").method(
        threshold=float(case["threshold"]),
        temporal=temporal if temporal > 0 else None,
        root_level=int(case["root_level"]),
        weighted=bool(case["weighted_avg"]),
        compat="official",
    )
    tokens = VisualTokens(video.flatten(0, 2), Layout.grid(height, width, frames=frames, modality="video"))
    (clip,) = method.clips(tokens)
    found = clip.blocks(0.0)
    np.testing.assert_array_equal(found.boxes.numpy(), case["nodes_tyxyx"])
    np.testing.assert_array_equal(torch.bincount(found.owner.flatten()).numpy(), case["patches_per_node"])
    np.testing.assert_allclose(clip.features(found).numpy(), case["out_features"], atol=1e-4, rtol=1e-4)
    assert method.own_count(tokens) == len(found)
    decision = method.merge(tokens, len(found))
    np.testing.assert_array_equal(decision.indices.numpy(), found.first.numpy())
    np.testing.assert_allclose(decision.features.numpy(), case["out_features"], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(decision.sizes.numpy(), case["patches_per_node"])
