"""Oryx's compressor: the sums, and the grid they fill."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mmfast.registry import get
from mmfast.token_pruning.before_llm.oryx_compressor import RATES, OryxCompressor
from mmfast.token_pruning.weights import fill, read
from mmfast.tokens import Layout, VisualTokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def check(case: dict[str, np.ndarray]) -> None:
    """Run the module, and the method where it shrinks anything, with the weights of the file."""
    tensors = {
        name.removeprefix("w_").replace("__", "."): torch.from_numpy(value)
        for name, value in case.items()
        if name.startswith("w_")
    }
    features, mode = torch.from_numpy(case["features"]), str(case["mode"])
    rows, cols = (int(size) for size in case["grid"])
    module = OryxCompressor(features.shape[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "compressor.safetensors")
        save_file(tensors, path)
        fill(module, read(path), path)
        found, grid = module(features, (rows, cols), mode)
        np.testing.assert_allclose(found.numpy(), case["out_features"], **CLOSE)
        assert list(grid) == case["out_grid"].tolist()
        if RATES[mode] == 1:
            return
        method = get("oryx_compressor").method(keep=1 / RATES[mode] ** 2, weights=path)
        for own, expected in zip(features, case["out_features"], strict=True):
            decision = method(VisualTokens(own, Layout.grid(rows, cols), signals={"patch_features": own}))
            assert decision is not None
            np.testing.assert_allclose(decision.features.numpy(), expected, **CLOSE)
