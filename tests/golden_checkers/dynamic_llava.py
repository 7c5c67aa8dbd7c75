"""Dynamic-LLaVA: both predictors, what they keep, and attention under a policy."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.in_llm.dynamic_llava import policy_softmax
from mmfast.token_pruning.layers import LayerTokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PREFIXES = {"vp.": "vision.", "tp.": "text."}


def check(case: dict[str, np.ndarray]) -> None:
    """Run the method with the weights of the file."""
    states = torch.from_numpy(case["x"])
    tensors = {
        PREFIXES[name[:3]] + name[3:]: torch.from_numpy(value) for name, value in case.items() if name[:3] in PREFIXES
    }
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "predictors.safetensors")
        save_file(tensors, path)
        method = get("dynamic_llava").method(
            keep=float(case["vision_keep_rate"]),
            predictor_width=int(case["d_model"]),
            predictor_heads=int(case["nhead"]),
            weights=path,
        )
        predictors = method.predictors(states)
        for row, own in enumerate(states):
            np.testing.assert_allclose(predictors.vision(own[None])[0].numpy(), case["vision_logits"][row], **CLOSE)
            np.testing.assert_allclose(predictors.text(own).numpy(), case["text_logits"][row], **CLOSE)
            np.testing.assert_array_equal(method.decode_keep(own).numpy(), case["text_keep"][row])
            kept = _kept(method, own)
            assert kept.numel() == int(case["n_keep"])
            np.testing.assert_array_equal(kept.numpy(), case["keep_index_sorted"][row])
    attended = policy_softmax(torch.from_numpy(case["attn_logits"]), torch.from_numpy(case["policy"]))
    np.testing.assert_allclose(attended.numpy(), case["policy_softmax"], **CLOSE)


def _kept(method: object, states: Tensor) -> Tensor:
    everything = torch.arange(states.shape[0])
    total = states.shape[0]
    tokens = LayerTokens(states, everything, everything, everything * 0, total, (total,))
    decision = method(tokens, method.events(32)[0])  # type: ignore[operator, attr-defined]
    return everything if decision is None else decision.indices
