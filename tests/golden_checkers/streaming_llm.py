"""StreamingLLM: the two ends, with room for tokens to come, and without a range."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.streaming_llm import StreamingLLM, without
from support.entries import Case


def check(case: Case) -> None:
    """Compare the prompt, the room made before a step, and the removal of a range."""
    length, start, recent = (int(case[name]) for name in ("seq_len", "start_size", "recent_size"))
    limit, coming = start + recent, int(case["num_coming"])
    method = StreamingLLM(keep=limit, start=start)
    states = torch.zeros(1, length, 1)
    entries = Entries.of(states, states)
    retained = method(entries)
    kept = torch.ones(length, dtype=torch.bool) if retained is None else retained.kept
    compare(kept, case["keep_idx"])
    room = without(length, *method.middle(length, limit, coming))
    compare(room, case["keep_idx_for_space"])
    compare(without(length, *case["evict_range"].tolist()), case["keep_idx_after_range"])
    if coming == 1:
        states = torch.zeros(1, length + 1, 1)
        mask = method.step(Step(states, states, states[:, :1], length + 1, memory=entries.memory))
        compare(torch.ones(length, dtype=torch.bool) if mask is None else mask[:-1], case["keep_idx_for_space"])
        assert mask is None or bool(mask[-1])


def compare(mask: torch.Tensor, expected: np.ndarray) -> None:
    """Compare a mask with places."""
    np.testing.assert_array_equal(mask.nonzero().squeeze(-1).numpy(), expected)
