"""PruneVid: sets and features before the language model, and the choice inside it."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.prunevid import PruneVid
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Layout, VisualTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Check both stages."""
    video = torch.from_numpy(case["features"])
    frames, each, _ = video.shape
    tokens = VisualTokens(video.flatten(0, 1), Layout.grid(1, each, frames=frames, modality="video"))
    method: PruneVid = get("prunevid").method(
        scenes=float(case["temporal_segment_ratio"]),
        cluster_ratio=float(case["cluster_ratio"]),
        threshold=float(case["tau"]),
        frame_neighbours=int(case["knn"]),
        compat="official",
    )
    groups = _sizes(case, method, tokens, each)
    kept = method.own_count(tokens)
    np.testing.assert_array_equal(kept, len(case["out_features"]))
    features = method.merge(tokens, kept).features
    np.testing.assert_allclose(features.numpy(), case["out_features"], atol=1e-4, rtol=1e-4)
    _inside(case, groups)


def _sizes(case: dict[str, np.ndarray], method: PruneVid, tokens: VisualTokens, each: int) -> list[int]:
    """Compare what is left per window; return the number per set that is treated by itself."""
    ends = np.cumsum(case["window_sizes"])
    static, dynamic, groups = np.zeros(len(ends), np.int64), np.zeros(len(ends), np.int64), []
    frames = np.zeros(len(ends), np.int64)
    for part in method.sets(tokens, None):
        window = int(np.searchsorted(ends, int(part.places[0, 0]) // each, side="right"))
        left = method.own_count_of(len(part))
        if len(part.places) > 1:
            static[window] += left
            frames[window] = len(part.places)
        else:
            dynamic[window] += left
        groups.append(left)
    np.testing.assert_array_equal(static, case["static_sizes"])
    np.testing.assert_array_equal(dynamic, case["dynamic_sizes"])
    seen = frames > 0
    np.testing.assert_array_equal(frames[seen], case["window_sizes"][seen])
    return groups


def _inside(case: dict[str, np.ndarray], groups: list[int]) -> None:
    """Let each set be a frame of the layout, and the text queries follow the visual tokens."""
    given = torch.from_numpy(case["text_to_visual_attention"])
    heads, text, visual = given.shape
    assert sum(groups) == visual
    weights = torch.zeros(heads, visual + text, visual + text)
    weights[:, visual:, :visual] = given
    frame = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    zeros = torch.zeros_like(frame)
    candidates = torch.arange(visual)
    method = get("prunevid_llm").method(keep=float(case["alpha"]), compat="official")
    tokens = LayerTokens(
        hidden=torch.zeros(visual + text, 4),
        candidates=candidates,
        origin=candidates,
        media=zeros,
        total=visual,
        media_totals=(visual,),
        layouts=(Layout("video", frame, zeros, zeros, candidates, zeros.bool()),),
        attention=DenseAttention.of(weights),
    )
    kept = method(tokens, method.events(32)[0])
    np.testing.assert_array_equal(candidates[kept.indices].numpy(), case["stage2_keep_idx"])
