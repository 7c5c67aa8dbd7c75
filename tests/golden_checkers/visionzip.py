"""VisionZip: dominant tokens and merged features, official layout."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.visionzip import merge_contextual
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Check the pieces of each image, then the method as it runs."""
    dominant, contextual = int(case["dominant"]), int(case["contextual"])
    for row in range(case["hidden_states"].shape[0]):
        hidden = torch.from_numpy(case["hidden_states"][row])
        keys = torch.from_numpy(case["key_metric"][row])[1:]
        attention = torch.from_numpy(case["cls_attention"][row]).mean(dim=0)
        expected = case["out_features"][row]
        features, total = hidden[1:], hidden.shape[0] - 1
        chosen = highest_first(attention, dominant - 1)
        np.testing.assert_array_equal(chosen.numpy() + 1, case["keep_idx_with_cls"][row][1:])
        chosen = chosen.sort().values
        np.testing.assert_array_equal(chosen.numpy(), case["keep_idx_patches"][row])
        left = torch.ones(total, dtype=torch.bool)
        left[chosen] = False
        targets, merged, _ = merge_contextual(features[left], keys[left], contextual)
        pieces = torch.cat([hidden[:1], features[chosen], merged])
        np.testing.assert_allclose(pieces.numpy(), expected, atol=1e-5, rtol=1e-5)
        if dominant + contextual >= total or dominant == 1:
            continue
        signals = {"cls_attention": attention, "keys": keys, "patch_features": features, "cls_features": hidden[:1]}
        tokens = VisualTokens(torch.zeros(total, 3), Layout.unknown(total), signals=signals, projectable=True)
        method = get("visionzip").method(keep=dominant + contextual, contextual=contextual, compat="official")
        decision = method(tokens)
        assert decision is not None
        assert decision.space == "vision"
        np.testing.assert_allclose(decision.features.numpy(), expected, atol=1e-5, rtol=1e-5)
        # Without the class token the same patches survive and the same are merged, each at its place.
        default = get("visionzip").method(keep=dominant + contextual - 1, contextual=contextual)(tokens)
        slots = torch.cat([chosen, left.nonzero().squeeze(-1)[targets]]).numpy()
        np.testing.assert_array_equal(default.indices.numpy(), np.sort(slots))
        np.testing.assert_allclose(default.features.numpy(), expected[1:][slots.argsort()], atol=1e-5, rtol=1e-5)
