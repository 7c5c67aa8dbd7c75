"""FastVID: segments, kept tokens and merged features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.fastvid import segment_lengths
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the segments, and what becomes of the visual tokens inside the whole sequence."""
    frames, places, start = int(case["num_frames"]), int(case["tokens_per_frame"]), int(case["video_start"])
    sequence, vectors = torch.from_numpy(case["hidden_states"])[0], torch.from_numpy(case["frame_global_features"])
    segments, threshold = int(case["c"]), float(case["tau"])
    lengths = segment_lengths(vectors, segments, threshold)
    np.testing.assert_array_equal(lengths, case["segment_sizes"])
    signals = {"cls_attention": torch.from_numpy(case["frame_attention"]).flatten(), "cls_features": vectors}
    layout = Layout.grid(1, places, frames=frames, modality="video")
    stop = start + frames * places
    method = get("fastvid").method(
        keep=float(case["retention_ratio"]),
        segments=segments,
        threshold=threshold,
        context=float(case["d"]),
        stride=int(case["p"]),
        weight=float(case["beta"]),
        frames_by="class_token",
        compat="official",
    )
    decision = method(VisualTokens(sequence[start:stop], layout, signals=signals))
    assert decision is not None
    kept = torch.cat([torch.arange(start), decision.indices + start, torch.arange(stop, len(sequence))])
    np.testing.assert_array_equal(kept.numpy(), case["keep_idx"])
    merged = torch.cat([sequence[:start], decision.features, sequence[stop:]])
    np.testing.assert_allclose(merged.numpy(), case["out_hidden"].reshape(merged.shape), atol=1e-4, rtol=1e-4)
