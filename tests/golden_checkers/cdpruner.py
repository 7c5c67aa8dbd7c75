"""CDPruner: relevance over the batch as the official code scales it, the order of the choice, and features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.cdpruner import clip_relevance, likeliest_subset, scaled_relevance
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image; a batch of one also goes through the method."""
    features, patches, texts = (torch.from_numpy(case[name]) for name in ("features", "image_embeds", "text_embeds"))
    relevance = scaled_relevance(clip_relevance(patches, texts))
    np.testing.assert_allclose(relevance.numpy(), case["relevance"], atol=1e-5, rtol=1e-5)
    kept = int(case["k"])
    for row in range(len(features)):
        order = likeliest_subset(features[row], relevance[row], kept)
        chosen = order.sort().values
        ours, theirs = features[row, chosen].numpy(), case["out_features"][row]
        if torch.unique(features[row], dim=0).shape[0] < features.shape[1]:
            # Of equal tokens any may be picked.
            np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
            continue
        np.testing.assert_array_equal(order.numpy(), case["selection_order"][row])
        np.testing.assert_array_equal(chosen.numpy(), case["keep_idx"][row])
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    if len(features) == 1 and kept < features.shape[1]:
        method = get("cdpruner").method(keep=kept, relevance="clip")
        tokens = VisualTokens.from_features(features[0], clip_image_embeds=patches[0], clip_text_embeds=texts)
        decision = method(tokens)
        assert decision is not None
        assert decision.indices.equal(chosen)
