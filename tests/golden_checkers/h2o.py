"""H2O: what is stored after the prompt and after each step, and what it has received."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.h2o import H2O
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Generate with the queries and keys of a case, prompt by prompt."""
    states = [tensor(case, name) for name in ("query", "key", "value")]
    for row in range(states[0].shape[0]):
        check_prompt(case, *(each[row] for each in states))


def check_prompt(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Compare one prompt."""
    prompt, heavy, recent = (int(case[name]) for name in ("prefill_len", "heavy", "recent"))
    method = H2O(keep=heavy + recent, recent=recent / (heavy + recent))
    entries = Entries.of(key[:, :prompt], value[:, :prompt], query[:, :prompt])
    retained, heads = method(entries), len(key)
    places = torch.arange(prompt).expand(heads, -1)
    if retained is not None:
        places = places[retained.by_head(heads)].view(heads, -1)
    compare(case, 0, places, entries.memory["received"])
    for token in range(prompt, query.shape[1]):
        places = torch.cat([places, torch.full((heads, 1), token)], dim=-1)
        wide = places[..., None].expand(-1, -1, key.shape[-1])
        step = Step(
            key.gather(1, wide),
            value.gather(1, wide),
            query[:, token : token + 1],
            token + 1,
            token + 1 - prompt,
            memory=entries.memory,
        )
        mask = method.step(step)
        if mask is not None:
            places = places[mask].view(heads, -1)
            entries.memory["received"] = entries.memory["received"][mask].view(heads, -1)
        compare(case, token + 1 - prompt, places, entries.memory["received"])


def compare(case: Case, row: int, places: torch.Tensor, received: torch.Tensor) -> None:
    """Compare what is stored with one row of the case."""
    # Before the limit is reached fewer are stored than the arrays are wide.
    width = places.shape[-1]
    np.testing.assert_array_equal(places.numpy(), case["kept_positions"][row][:, :width])
    np.testing.assert_allclose(received.numpy(), case["accumulated_scores"][row][:, :width], rtol=1e-5, atol=1e-5)
