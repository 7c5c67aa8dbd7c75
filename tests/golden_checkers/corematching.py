"""CoreMatching: match counts by the rule of the released code, the elbow and what lies above it."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.in_llm.corematching import CoreMatching, above_elbow, elbow
from mmfast.token_pruning.layers import LayerTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Feed the signs of the activations of one layer."""
    activations = torch.from_numpy(case["mlp_act"])[0].float()
    start, visual = int(case["image_start"]), int(case["image_len"])
    candidates = torch.arange(start, start + visual)
    tokens = LayerTokens(
        hidden=torch.zeros(activations.shape[0], 1),
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        activations=activations,
    )
    method = CoreMatching(rule="sign", query_offset=int(case["query_offset_from_end"]))
    matches = method.matches(tokens)
    np.testing.assert_array_equal(matches.numpy(), case["match_count"])
    ordered = matches.sort(descending=True).values
    assert elbow(ordered) == int(case["elbow_index"])
    assert float(ordered[elbow(ordered)]) == float(case["elbow_value"])
    above = above_elbow(matches)
    np.testing.assert_array_equal(above.numpy(), case["kept_local_index"])
    decision = method(tokens, method.events(32)[0])
    kept = torch.arange(visual) if decision is None else decision.indices
    # Where the official code would keep nothing, because the curve has no elbow, we keep everything.
    np.testing.assert_array_equal(kept.numpy(), case["kept_local_index"] if len(above) else np.arange(visual))
