"""HoliTom before the language model: similarities, windows, counts and features in the official order."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.holitom import best_windows, frame_similarity
from mmfast.token_pruning.before_llm.prunevid import split_windows
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Only D = 0 is official."""
    video = torch.from_numpy(case["features"])
    frames, each, _ = video.shape
    features, total = video.flatten(0, 1), frames * each
    share = float(case["retain_ratio"])
    method = get("holitom").method(
        keep=share,
        threshold=float(case["tau"]),
        weight=float(case["beta"]),
        neighbours=int(case["K"]),
        compat="official",
    )
    places = list(torch.arange(total).view(frames, each))
    similarity = [frame_similarity(features, places[index], places[index + 1]) for index in range(frames - 1)]
    found = torch.stack(similarity).numpy() if similarity else np.zeros((0, each), np.float32)
    np.testing.assert_allclose(found, case["frame_similarity"].reshape(-1, each), atol=1e-5, rtol=1e-5)
    windows, saved = best_windows([values > method.threshold for values in similarity], places)
    np.testing.assert_array_equal(np.array(windows), case["windows"])
    assert saved == int(case["total_reduced"])
    assert np.isclose(min(share / ((total - saved) / total), 1.0), float(case["effective_ratio"]), atol=1e-6)
    windows, static = method.windows(similarity, places, total)
    sets = split_windows(features, places, windows, static)
    per_window = np.zeros(len(windows), np.int64)
    for part, count in zip(sets, method.counts(sets, share), strict=True):
        frame = int(part.places[0, 0]) // each
        per_window[next(number for number, (start, end) in enumerate(windows) if start <= frame <= end)] += count
    np.testing.assert_array_equal(per_window, case["tokens_per_window"])
    attention = torch.from_numpy(case["frame_attention"]).flatten()
    layout = Layout.grid(1, each, frames=frames, modality="video")
    decision = method.merge(
        VisualTokens(features, layout, signals={"received_attention": attention}), method.keep_count(total)
    )
    np.testing.assert_allclose(decision.features.numpy(), case["out_features"], atol=1e-4, rtol=1e-4)
