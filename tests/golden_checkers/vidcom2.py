"""VidCom2: likeness to video and frame, what each frame may keep, and what it keeps."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.vidcom2 import frame_scales, likeness
from mmfast.token_pruning.similarity import frame_places
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare every step, and the official counts."""
    places, scale = int(case["tokens_per_frame"]), float(case["base_scale"])
    features = torch.from_numpy(case["features"])
    frames = len(features) // places
    layout = Layout.grid(1, places, frames=frames, modality="video")
    video, frame = likeness(features, frame_places(layout))
    np.testing.assert_allclose(torch.stack(video).numpy(), case["video_score"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(torch.stack(frame).numpy(), case["frame_score"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(frame_scales(video, scale).numpy(), case["frame_scales"], atol=1e-5, rtol=1e-5)
    decision = get("vidcom2").method(keep=scale, compat="official")(VisualTokens(features, layout))
    kept = np.arange(len(features)) if decision is None else decision.indices.numpy()
    np.testing.assert_array_equal(kept, case["keep_idx"])
    np.testing.assert_array_equal(np.bincount(kept // places, minlength=frames), case["tokens_kept_per_frame"])
