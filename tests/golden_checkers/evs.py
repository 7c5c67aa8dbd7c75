"""EVS: how much each token changes, and which are kept."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.evs import dissimilarity
from mmfast.token_pruning.similarity import frame_places
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare, with the fraction that is given and with the count that comes out."""
    frames, rows, columns = case["grid_thw"].tolist()
    merge = int(case["spatial_merge_size"])
    layout = Layout.grid(rows // merge, columns // merge, frames=frames, modality="video")
    tokens = VisualTokens(torch.from_numpy(case["features"]), layout)
    change = dissimilarity(tokens.features, layout, frame_places(layout))
    np.testing.assert_allclose(change.numpy(), case["dissimilarity"].reshape(-1), atol=1e-5, rtol=1e-5)
    total = int(case["num_keep"])
    for keep in (1.0 - float(case["pruning_rate"]), total):
        mask = np.ones(len(tokens), dtype=bool)
        decision = get("evs").method(keep=keep, compat="official")(tokens)
        if decision is not None:
            mask[:] = False
            mask[decision.indices.numpy()] = True
        np.testing.assert_array_equal(mask, case["keep_mask"].reshape(-1))
        assert mask.sum() == total
