"""DPN: one step of the router and its pooling, and the loss."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.in_llm.dpn import STRIDES, DpnRouters, hinge_loss, pool_map
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Layout

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(case: dict[str, np.ndarray]) -> None:
    """Tell the kinds of file apart by what they hold."""
    if "hidden_states" in case:
        _step(case)
        return
    rows, layers = torch.from_numpy(case["router_probs"]), torch.from_numpy(case["layer_of_row"])
    np.testing.assert_allclose(hinge_loss(rows, layers).item(), float(case["loss_per_layer"]), **CLOSE)
    np.testing.assert_allclose(hinge_loss(rows, layers, "global").item(), float(case["loss_official"]), **CLOSE)


def _step(case: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(np.array(STRIDES), case["strides"])
    assert int(case["temperature"]) == 10
    states = torch.from_numpy(case["hidden_states"])[0]
    start, height, width = (int(case[name]) for name in ("image_start", "map_h", "map_w"))
    router = torch.from_numpy(np.atleast_1d(case["router_positions"]))
    tensors = {
        "routers.0.norm.weight": torch.from_numpy(case["ln_w"]),
        "routers.0.norm.bias": torch.from_numpy(case["ln_b"]),
        "routers.0.reduce.weight": torch.from_numpy(case["fc1"]),
        "routers.0.choose.weight": torch.from_numpy(case["fc2"]),
    }
    routers = DpnRouters(states.shape[1], 1)
    routers.load_state_dict(tensors)
    with torch.no_grad():
        probability = routers(states[router].mean(dim=0), 0)
    expert = int(probability.argmax())
    np.testing.assert_allclose(probability.numpy(), case["probs"].reshape(-1), **CLOSE)
    assert expert == int(case["expert"])
    end = start + height * width
    pooled = pool_map(states[start:end], height, width, STRIDES[expert]) * probability[expert]
    output = torch.cat([states[:start], pooled, states[end:]])
    np.testing.assert_allclose(output.numpy(), case["out_hidden"][0], **CLOSE)
    sides = (height // min(STRIDES[expert][0], height), width // min(STRIDES[expert][1], width))
    assert sides == tuple(case["out_map"].tolist())
    if height * width >= 16:
        _method(states, router, tensors, (start, height, width), pooled)


def _method(
    states: Tensor, router: Tensor, tensors: dict[str, Tensor], place: tuple[int, int, int], pooled: Tensor
) -> None:
    """The method reads the last prompt token: let that be the mean of the official router's tokens."""
    start, height, width = place
    total = height * width
    candidates = torch.arange(start, start + total)
    tokens = LayerTokens(
        hidden=torch.cat([states, states[router].mean(dim=0, keepdim=True)]),
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=total,
        media_totals=(total,),
        layouts=(Layout.grid(height, width),),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "routers.safetensors")
        save_file(tensors, path)
        method = get("dpn").method(weights=path, layers=(0.25,), fractions=(0.5,))
        decision = method(tokens, method.events(32)[0])
    assert decision is not None
    assert decision.features is not None
    np.testing.assert_allclose(decision.features.numpy(), pooled.numpy(), **CLOSE)
