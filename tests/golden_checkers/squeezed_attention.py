"""Squeezed Attention: centres, thresholds over all layers, and what is read above one of them."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.retrieval.quest import means_by_label
from mmfast.kv.retrieval.squeezed_attention import cluster_scores, members_above, quantile
from mmfast.token_pruning.attention import AttentionView
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare per layer what is per layer; clusters are given, since k-means has many right answers."""
    count, window = int(case["num_clusters"]), int(case["observation_window"])
    labels, query, decoded = tensor(case, "labels"), tensor(case, "query"), tensor(case, "query_decode")
    scores, later = [], []
    for layer, keys in enumerate(tensor(case, "key")):
        centres, sizes = means_by_label(keys[:, : labels.shape[-1]], labels[layer], count)
        np.testing.assert_allclose(centres.numpy(), case["centroids"][layer], rtol=1e-5, atol=1e-5)
        rows = torch.arange(keys.shape[1] - window, keys.shape[1])
        logits = AttentionView(query[layer], centres).logits(rows, masked=False)
        scores.append(cluster_scores(logits, sizes).mean(dim=1).gather(-1, labels[layer]))
        one = AttentionView(decoded[layer], centres).logits(torch.zeros(1, dtype=torch.int64), masked=False)
        later.append(cluster_scores(one, sizes)[:, 0])
    thresholds = [quantile(torch.stack(scores), float(level)) for level in case["threshold_quantiles"]]
    np.testing.assert_allclose([float(value) for value in thresholds], case["thresholds"], rtol=1e-5, atol=1e-5)
    threshold = thresholds[list(np.round(case["threshold_quantiles"], 6)).index(0.7)]
    chosen = members_above(torch.stack(later), labels, threshold)
    np.testing.assert_array_equal(chosen.numpy(), case["keep_mask_q07"])
