"""StreamMem: attention of the proxies, the entries they choose, and the summaries of the frames."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.streammem import choose_slots
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare a prompt of memory (visual, of no frame), clip and proxies (text)."""
    query, memory = tensor(case, "proxy_query")[0], int(case["memory_len"])
    count, size = int(case["frames"]), int(case["tokens_per_frame"])
    total, proxies = memory + count * size, query.shape[1]
    states = tensor(case, "key")[0], tensor(case, "value")[0]
    keys, values = (torch.cat([part, part.new_zeros(len(part), proxies, part.shape[-1])], dim=1) for part in states)
    assert keys.shape[1] == total + proxies
    text = torch.full((proxies,), -1)
    frame = torch.cat([torch.full((memory,), -1), torch.arange(count).repeat_interleave(size), text])
    media = torch.cat([torch.zeros(memory), torch.ones(count * size), text]).long()
    queries = torch.cat([query.new_zeros(len(query), total, query.shape[-1]), query], dim=1)
    entries = Entries(keys, values, media >= 0, media, frame, attention=AttentionView(queries, keys))
    method = get("streammem").method(keep=int(case["keep"]), proxies=proxies)

    score = method.score(entries, method.keep)
    np.testing.assert_allclose(score[:total].numpy(), case["score"], rtol=1e-5, atol=1e-5)
    if method.keep >= total:
        assert method(entries) is None
        return
    stays, slots = choose_slots(score[:total], frame[:total], method.keep)
    assert int(stays.sum()) == method.keep
    # Of what stays, some are summaries; one that is not in the list has replaced the summary of a whole frame.
    whole = np.setdiff1d(np.arange(count), frame[:total][slots].numpy())
    raw = (stays & ~slots).nonzero().squeeze(-1).numpy()
    assert np.isin(case["keep_idx"], raw).all()
    assert len(raw) == len(case["keep_idx"]) + len(whole)

    retained = method(entries)
    np.testing.assert_array_equal(retained.kept[:total].numpy(), stays.numpy())
    assert bool(retained.kept[total:].all())
    for slot in slots.nonzero().squeeze(-1).tolist():
        for name, found in (("prototype_key", retained.keys), ("prototype_value", retained.values)):
            expected = case[name][0][:, int(frame[slot])]
            np.testing.assert_allclose(found[:, slot].numpy(), expected, rtol=1e-5, atol=1e-5)
    for found, given in ((retained.keys, keys), (retained.values, values)):
        np.testing.assert_array_equal(found[:, raw].numpy(), given[:, raw].numpy())
