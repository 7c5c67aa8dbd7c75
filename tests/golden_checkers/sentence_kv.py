"""SentenceKV: means of the sentences, and the entries that the best ones give."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.retrieval.quest import means_by_label
from mmfast.kv.retrieval.sentence_kv import take_sentences
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare means, lengths and choice; the official code writes the length of an empty sentence as one."""
    keys = tensor(case, "key")[0]
    bounds = tensor(case, "sentence_bounds")
    count = len(bounds) - 1
    sentence = torch.searchsorted(bounds, tensor(case, "original_index").contiguous(), right=True) - 1
    sentence = sentence.clamp(0, count - 1)
    means, lengths = means_by_label(keys, sentence, count)
    np.testing.assert_allclose(means.numpy(), case["sentence_mean_key"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(lengths.clamp(min=1).numpy(), case["sentence_len"])
    slots = torch.arange(keys.shape[1])
    able = ((slots > int(case["left"])) & (slots < int(case["right"]))).expand(keys.shape[:2])
    likeness = torch.einsum("hd,hsd->hs", tensor(case, "query_mean"), means)
    chosen = take_sentences(likeness, sentence, able, int(case["max_tokens"]))
    np.testing.assert_array_equal(chosen.numpy(), case["selected_slot_mask"])
