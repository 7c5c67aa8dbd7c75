"""LLaVA-Mini's compressor: what the queries read, where they looked, and its table of positions."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mmfast.registry import get
from mmfast.token_pruning.before_llm.llava_mini_resampler import LlavaMiniResampler
from mmfast.token_pruning.weights import fill, read
from mmfast.tokens import Layout, VisualTokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def check(case: dict[str, np.ndarray]) -> None:
    """Run the module, and the method where a projector would follow, with the weights of the file."""
    tensors = {
        name.removeprefix("w_").replace("__", "."): torch.from_numpy(value)
        for name, value in case.items()
        if name.startswith("w_")
    }
    features = torch.from_numpy(case["features"])
    side, heads, grid = int(case["grid_size"]), int(case["num_heads"]), math.isqrt(features.shape[1])
    module = LlavaMiniResampler(features.shape[-1], side, heads)
    np.testing.assert_allclose(module.pos_embed.numpy(), case["w_pos_embed"], **CLOSE)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "resampler.safetensors")
        save_file(tensors, path)
        fill(module, read(path), path)
        found, attention = module(features, (grid, grid), need_weights=True)
        np.testing.assert_allclose(found.numpy(), case["out_features"], **CLOSE)
        np.testing.assert_allclose(attention.numpy(), case["attention"], **CLOSE)
        method = get("llava_mini_resampler").method(keep=side**2, heads=heads, weights=path)
        for own, expected in zip(features, case["out_features"], strict=True):
            decision = method(VisualTokens(own, Layout.grid(grid, grid), signals={"patch_features": own}))
            assert decision is not None
            np.testing.assert_allclose(decision.features.numpy(), expected, **CLOSE)
