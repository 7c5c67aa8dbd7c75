"""Double Sparsity: approximate logits, the choice of each query head, and the attention over it."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Step
from mmfast.kv.retrieval.double_sparsity import label_keys, label_logits
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare with the given order of channels; sixteen bits mean not rounded."""
    bits = int(case["label_bits"])
    method = get("double_sparsity").method(
        keep=int(case["keep"]),
        group_factor=int(case["group_factor"]),
        label_bits=bits if bits < 16 else None,
        dense_layers=0,
    )
    query, values = tensor(case, "query_decode"), tensor(case, "value")
    channels = tensor(case, "channel_order")[:, : query.shape[-1] // method.group_factor]
    for row, keys in enumerate(tensor(case, "key")):
        labels = label_keys(keys, channels, method.label_bits)
        logits = label_logits(query[row, :, 0], channels, labels, method.label_bits)
        np.testing.assert_allclose(logits.numpy(), case["label_logits"][row, :, 0], rtol=1e-5, atol=1e-5)
        memory = {"channels": channels, "labels": labels}
        step = Step(keys, values[row], query[row], seen=keys.shape[1], added=0, memory=memory)
        chosen = method.choose(step)
        mask = torch.ones_like(logits, dtype=torch.bool) if chosen is None else chosen
        np.testing.assert_array_equal(mask.numpy(), case["keep_mask"][row, :, 0])
        attention = step.logits().masked_fill(~mask, -torch.inf).softmax(dim=-1)
        output = torch.einsum("hn,hnd->hd", attention, values[row].repeat_interleave(len(mask) // len(keys), dim=0))
        np.testing.assert_allclose(output.numpy(), case["attention_output"][row, :, 0], rtol=1e-4, atol=1e-4)
