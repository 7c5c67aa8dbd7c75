"""ReKV: what each block is worth to the question, and the blocks it chooses."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.rekv import best_blocks, block_logits
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare the functions, and the method on a prompt of these blocks and then the question."""
    keys, question = tensor(case, "key")[0], tensor(case, "query")[0]
    size, chunk, top = int(case["block_size"]), int(case["chunk"]), int(case["topk"])
    block = torch.arange(keys.shape[1]) // size
    logits = block_logits(question, keys, block)
    np.testing.assert_allclose(logits.numpy(), case["block_logits"], rtol=1e-5, atol=1e-5)
    chosen = best_blocks(logits, top // chunk, chunk)
    np.testing.assert_array_equal(chosen.nonzero().squeeze(-1).numpy(), case["retrieved_blocks"])

    visual = torch.cat([torch.ones_like(block), torch.zeros(question.shape[1])]).bool()
    frame = torch.cat([block, torch.full((question.shape[1],), -1)])
    states = torch.cat([keys, torch.zeros(keys.shape[0], question.shape[1], keys.shape[2])], dim=1)
    queries = torch.cat([torch.zeros(question.shape[0], *keys.shape[1:]), question], dim=1)
    entries = Entries.of(states, states, visual=visual, frame=frame, attention=AttentionView(queries, states))
    method = get("rekv").method(keep=top * size + question.shape[1], chunk=chunk, dense_layers=0)
    method.prepare(entries)
    step = Step(states, states, question[:, :1], seen=len(entries), added=0, memory=entries.memory)
    read = method.choose(step)
    mask = torch.ones_like(visual) if read is None else read
    np.testing.assert_array_equal(block[mask[: len(block)]].unique().numpy(), case["retrieved_blocks"])
    assert bool(mask[len(block) :].all())
