"""PromptDistill: which tokens are left after each stage, their states and positions, and the caches."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.in_llm.promptdistill import smoothed


def check(case: dict[str, np.ndarray]) -> None:
    """Select prompt by prompt from the logits of each stage, over all prompt tokens as the official code does."""
    hidden, mask = torch.from_numpy(case["hidden_states"]), torch.from_numpy(case["attention_mask"]).bool()
    depth = len(case["cache_len"])
    # Behind the last layer there is nothing to shorten.
    events = [int(layer) + 1 for layer in case["selection_layers"] if int(layer) + 1 < depth]
    lengths = [hidden.shape[1]]
    kept = [torch.arange(hidden.shape[1]) for _ in range(len(hidden))]
    for stage in range(len(events)):
        logits = torch.from_numpy(case[f"selection_logits_{stage}"])
        longest = 0
        for row, end in enumerate(case["prompt_ends"].tolist()):
            valid = int(mask[row].sum())
            own = kept[row][kept[row] < valid]
            place = int((own < end).sum())
            scores = smoothed(logits[row, : logits.shape[1]], place, pooling=bool(case["use_pooling"]))
            chosen = top_indices(scores[:place], min(int(case["n_topks"][stage]), place))
            kept[row] = own[torch.cat([chosen, torch.arange(place, own.numel())])]
            longest = max(longest, kept[row].numel())
        lengths.append(longest)
    for row, places in enumerate(kept):
        count = places.numel()
        np.testing.assert_array_equal(places.numpy(), case["truncation_idx"][row, :count])
        states = hidden[row, places].numpy()
        np.testing.assert_allclose(states, case["final_hidden_in"][row, :count], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(places.numpy(), case["final_position_ids"][row, :count])
    if events:
        _caches(case, events, lengths)


def _caches(case: dict[str, np.ndarray], events: list[int], lengths: list[int]) -> None:
    depth = len(case["cache_len"])
    stored = [lengths[sum(event <= layer for event in events)] for layer in range(depth)]
    method = get("promptdistill").method(
        layers=tuple(events),
        fractions=tuple(0.5 / (step + 1) for step in range(len(events))),
        truncated_steps=int(case["cache_truncation_end"]),
    )
    for layer, first, last in method.truncations(depth):
        # Later cuts come later in the list and go further.
        stored[first:last] = [lengths[events.index(layer) + 1]] * (last - first)
    np.testing.assert_array_equal(stored, case["cache_len"])
