"""MustDrop's vision stage: merged windows, sizes, where each patch went, and the key set."""

from __future__ import annotations

import math

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.mustdrop_vision import merge_windows, whole_windows, window_similarity
from mmfast.token_pruning.encoder_base import EncoderTokens, merge_rows
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import Layout


def check(case: dict[str, np.ndarray]) -> None:
    """The official code merges in every image of a batch as many windows as in the one that allows fewest."""
    hidden, threshold, window = torch.from_numpy(case["hidden_states"]), float(case["threshold"]), int(case["window"])
    side = math.isqrt(hidden.shape[1] - 1)
    members = whole_windows(Layout.grid(side, side), window)
    similarity = [window_similarity(row[1:], members) for row in hidden]
    alike = [int((values >= threshold).sum()) for values in similarity]
    for index, row in enumerate(hidden):
        places, source = merge_windows(side * side, members, similarity[index], min(alike))
        source = torch.cat([torch.zeros(1, dtype=torch.int64), source + 1])
        merged, sizes = merge_rows(row, torch.ones(len(row)), source, len(places) + 1)
        np.testing.assert_allclose(merged.numpy(), case["out_features"][index], atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(sizes.numpy(), case["out_size"][index, :, 0])
        np.testing.assert_array_equal(source.numpy(), case["source_assign"][index])
        attention = torch.from_numpy(case["cls_attention_after"][index]).mean(dim=0)
        # Dropping by attention takes the key set last.
        keys = highest_first(attention, math.ceil(float(case["key_rate"]) * len(attention)))
        np.testing.assert_array_equal(keys.numpy(), case["key_set"][index])
        if alike[index] == min(alike):
            method = get("mustdrop_vision").method(window=window, threshold=threshold)
            own = EncoderTokens(row, row, torch.ones(len(row)), (side, side), True)
            assert method.merge_block(own, 2)[1].equal(source)
