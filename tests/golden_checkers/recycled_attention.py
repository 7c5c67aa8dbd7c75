"""Recycled attention: what every step reads, and its attention."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Step
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Feed the decode steps one by one."""
    prompt = int(case["prefill_len"])
    method = get("recycled_attention").method(
        keep=int(case["topk"]), stride=int(case["stride"]), recent=int(case["recent"]), dense_layers=0
    )
    query, values = tensor(case, "query"), tensor(case, "value")
    for row, keys in enumerate(tensor(case, "key")):
        memory: dict[str, torch.Tensor] = {}
        group = query.shape[1] // len(keys)
        for index in range(query.shape[2]):
            length = prompt + index + 1
            step = Step(
                keys[:, :length],
                values[row, :, :length],
                query[row, :, index : index + 1],
                seen=length,
                added=index + 1,
                memory=memory,
            )
            read = method.choose(step)
            mask = torch.ones(len(keys), length, dtype=torch.bool) if read is None else read
            expected = case["attend_mask"][row, index]
            np.testing.assert_array_equal(mask.numpy(), expected[:, :length])
            assert not expected[:, length:].any()
            logits = step.logits().masked_fill(~mask.repeat_interleave(group, dim=0), -torch.inf)
            seen = step.values.repeat_interleave(group, dim=0)
            output = torch.einsum("hn,hnd->hd", logits.softmax(dim=-1), seen)
            np.testing.assert_allclose(output.numpy(), case["attention_output"][row, :, index], rtol=1e-4, atol=1e-4)
