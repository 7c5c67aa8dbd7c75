"""ToMe: merged features, sizes and where each token went, in the official order."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.tome import match_rounds
from mmfast.token_pruning.encoder_base import EncoderTokens, merge_rows
from mmfast.token_pruning.similarity import halvings
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare each image, and the method where it would take the same rounds."""
    rounds, class_token = [int(case["r"])] * int(case["rounds"]), bool(case["class_token"])
    rows = zip(
        case["features"], case["metric"], case["out_features"], case["out_size"], case["source_assign"], strict=True
    )
    for features, metric, expected, sizes, source in rows:
        values, keys = torch.from_numpy(features), torch.from_numpy(metric)
        ones = torch.ones(len(values))
        places, joined = match_rounds(keys, rounds, class_token=class_token)
        merged, summed = merge_rows(values, ones, joined, len(places))
        np.testing.assert_allclose(merged.numpy(), expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(summed.numpy(), sizes[:, 0])
        np.testing.assert_array_equal(joined.numpy(), source)
        if list(halvings(len(values), len(places), protected=class_token)) != [r for r in rounds if r > 0]:
            continue
        method = get("tome").method(keep=len(places))
        own = EncoderTokens(values, keys, ones, (1, len(values) - class_token), class_token)
        assert method.merge_block(own, len(places))[1].equal(joined)
        if not class_token and np.array_equal(features, metric):
            decision = method(VisualTokens.from_features(values))
            assert decision is not None
            np.testing.assert_allclose(
                decision.features[places.argsort().argsort()].numpy(), expected, atol=1e-5, rtol=1e-5
            )
