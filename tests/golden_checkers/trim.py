"""TRIM: how many tokens come out, and their features, the mean of the rest last."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.before_llm.trim import relevance_of, with_mean_of_rest
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image."""
    features = torch.from_numpy(case["features"])
    total, out = features.shape[1], int(case["num_out"])
    ratio = float(case["ratio"])
    for row in range(len(features)):
        patches, text = (torch.from_numpy(case[name])[row] for name in ("projected_patch_embeds", "text_embed"))
        scores = relevance_of(patches, text)
        signals = {"clip_image_embeds": patches, "clip_text_embeds": text[None]}
        tokens = VisualTokens(features[row], Layout.unknown(total), signals=signals)
        if ratio < 0:
            assert get("trim").method(relevance="clip").own_count(tokens) == out
        else:
            assert int(total * ratio) + 1 == out
        best = top_indices(scores, out - 1)
        decision = with_mean_of_rest(features[row], best)
        assert decision.features is not None
        assert decision.source is not None
        # The official code appends the mean; here it stands where its last token stood.
        mean = int(decision.source[~torch.isin(torch.arange(total), best)][0])
        order = [place for place in range(out) if place != mean] + [mean]
        np.testing.assert_allclose(decision.features[order].numpy(), case["out_features"][row], atol=1e-5, rtol=1e-5)
        method = get("trim").method(keep=out, relevance="clip")
        chosen = method(tokens)
        assert chosen is not None
        assert chosen.indices.equal(decision.indices)
