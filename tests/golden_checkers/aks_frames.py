"""AKS: how a video is halved, and the frames taken of each stretch."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.frame_base import unit_range
from mmfast.token_pruning.frames.aks import best_of, stretches


def check(case: dict[str, np.ndarray]) -> None:
    """Compare with the official segments and frames."""
    scores = unit_range(torch.from_numpy(case["scores"]))
    numbers, count = case["frame_numbers"], int(case["num_frames"])
    assert scores is not None
    if len(scores) < count:
        assert case["selected"].astype(np.int64).tolist() == numbers.tolist()
        return
    parts = stretches(scores, count, float(case["t1"]), float(case["t2"]), int(case["all_depth"]))
    assert [halvings for *_, halvings in parts] == case["segment_depths"].tolist()
    assert [end - begin for begin, end, _ in parts] == case["segment_lengths"].tolist()
    assert numbers[best_of(scores, parts, count).numpy()].tolist() == case["selected"].astype(np.int64).tolist()
