"""RazorAttention: the entries that stand for dropped ones, and the attention over what is left."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.razor_attention import compensated
from mmfast.token_pruning.attention import AttentionView
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare every prompt of the batch; the sizes of heads are given, where the method solves for them."""
    sinks, recent, seeks = int(case["sinks"]), int(case["recent"]), torch.from_numpy(case["retrieval_kv_head"])
    prompts = zip(tensor(case, "key"), tensor(case, "value"), tensor(case, "query_decode"), strict=True)
    for row, (keys, values, query) in enumerate(prompts):
        entries = Entries.of(keys, values)
        ends = torch.full((len(keys),), sinks), torch.full((len(keys),), recent)
        every = compensated(entries, *ends, torch.zeros_like(seeks))
        dropped = int(case["num_dropped"])
        # One entry stands for the dropped ones.
        assert every.counts == [len(entries) - dropped + (dropped > 0)] * len(keys)
        if dropped:
            for name, found in (("compensation_key", every.keys), ("compensation_value", every.values)):
                np.testing.assert_allclose(found[:, sinks].numpy(), case[name][row], rtol=1e-5, atol=1e-5)

        found = compensated(entries, *ends, seeks)
        assert found.counts == [len(entries) if seek else every.counts[0] for seek in seeks]
        group = len(query) // len(keys)
        view = AttentionView(query, found.keys)
        logits = view.logits(torch.zeros(1, dtype=torch.int64), masked=False)
        logits = logits + found.bias.repeat_interleave(group, dim=0)[:, None]
        logits = logits.masked_fill(~found.kept.repeat_interleave(group, dim=0)[:, None], -torch.inf)
        output = logits.softmax(dim=-1) @ found.values.repeat_interleave(group, dim=0)
        np.testing.assert_allclose(output.numpy(), case["attention_output"][row], rtol=1e-4, atol=1e-4)
