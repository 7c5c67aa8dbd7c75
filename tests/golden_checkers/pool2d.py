"""Pooling: averaged features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.before_llm.pool2d import pool_grid


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the pooled grid of each image."""
    for features, expected in zip(case["features"], case["out_features"], strict=True):
        pooled = pool_grid(torch.from_numpy(features), int(case["grid_h"]), int(case["out_h"]), int(case["out_w"]))
        np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-5, rtol=1e-5)
