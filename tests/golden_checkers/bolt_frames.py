"""BOLT: frames sampled in proportion to their score."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.frame_base import unit_range
from mmfast.token_pruning.frames.bolt import sampled


def check(case: dict[str, np.ndarray]) -> None:
    """Compare with the official frames, which may repeat; a power of -1 means none."""
    scores = unit_range(torch.from_numpy(case["scores"]))
    power = float(case["power"])
    assert scores is not None
    found = sampled(scores, int(case["num_frames"]), power if power > 0 else 1.0)
    assert found.tolist() == case["indices"].tolist()
