"""TRIM: how many tokens come out, and their features, the mean of the rest last."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.before_llm.trim import relevance_of, with_mean_of_rest
from mmfast.token_pruning.similarity import outlier_share
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image."""
    features = torch.from_numpy(case["features"])
    total, out = features.shape[1], int(case["num_out"])
    ratio = float(case["ratio"])
    pairs = zip(*(torch.from_numpy(case[name]) for name in ("projected_patch_embeds", "text_embed")), strict=True)
    everything = torch.stack([relevance_of(*pair) for pair in pairs])
    # The official share of outstanding scores is that of the whole batch.
    assert int(total * (outlier_share(everything) if ratio < 0 else ratio)) + 1 == out
    for row in range(len(features)):
        patches, text = (torch.from_numpy(case[name])[row] for name in ("projected_patch_embeds", "text_embed"))
        signals = {"clip_image_embeds": patches, "clip_text_embeds": text[None]}
        tokens = VisualTokens(features[row], Layout.unknown(total), signals=signals)
        if ratio < 0 and len(features) == 1:
            assert get("trim").method(relevance="clip").own_count(tokens) == out
        best = top_indices(everything[row], out - 1)
        decision = with_mean_of_rest(features[row], best)
        assert decision.features is not None
        assert decision.source is not None
        # The official code appends the mean; here it stands where its last token stood.
        mean = int(decision.source[~torch.isin(torch.arange(total), best)][0])
        order = [place for place in range(out) if place != mean] + [mean]
        ours, theirs = decision.features[order].numpy(), case["out_features"][row]
        if torch.unique(features[row], dim=0).shape[0] < total:
            # Of equal tokens either may stay.
            ours, theirs = ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)]
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
        if out < total:
            chosen = get("trim").method(keep=out, relevance="clip")(tokens)
            assert chosen is not None
            assert chosen.indices.equal(decision.indices)
