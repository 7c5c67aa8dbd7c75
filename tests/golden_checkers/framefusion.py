"""FrameFusion: each call, from the states the one before left."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from mmfast.tokens import Layout
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """No layers lie between the calls."""
    states = torch.from_numpy(case["hidden_states"])[0]
    start, visual = int(case["visual_start"]), int(case["visual_length"])
    place = torch.from_numpy(case["patch_type"])[0, start : start + visual]
    zeros = torch.zeros_like(place)
    before = (place == place[:, None]).tril(-1).sum(dim=1)
    layout = Layout("video", before, zeros, zeros, place, zeros.bool())
    method = get("framefusion").method(
        cost=float(case["cost"]),
        threshold=float(case["similarity_lower_bound"]),
        least=float(case["ratio_lower_bound"]),
    )
    memory: dict[str, object] = {}
    origin, depth = torch.arange(visual), int(case["num_layers"])
    for call in range(int(case["num_calls"])):
        alive, length = origin.numel(), len(states)
        row = case.get(f"call{call}_attention_last_query")
        attention = None
        if row is not None:
            weights = torch.zeros(len(row), length, length)
            weights[:, -1] = torch.from_numpy(row)
            attention = DenseAttention.of(weights)
        candidates = torch.arange(start, start + alive)
        tokens = LayerTokens(
            hidden=states,
            candidates=candidates,
            origin=origin,
            media=torch.zeros_like(candidates),
            total=visual,
            media_totals=(visual,),
            layouts=(layout,),
            attention=attention,
            memory=memory,
        )
        decision = method(tokens, LayerEvent(call, call, depth))
        if decision is not None:
            own = states[candidates[decision.indices]]
            if decision.features is not None:
                own = torch.where(decision.features.isnan(), own, decision.features)
            states = torch.cat([states[:start], own, states[start + alive :]])
            origin = origin[decision.indices]
        positions = torch.cat([torch.arange(start), origin + start, _after(case, start + visual)])
        np.testing.assert_array_equal(positions.numpy(), case[f"call{call}_positions"])
        np.testing.assert_allclose(states.numpy(), case[f"call{call}_hidden"], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(memory["sparsity"], case[f"call{call}_sparsity_list"], atol=1e-6)
        finish = [bool(memory.get("merged")), bool(memory.get("done"))]
        np.testing.assert_array_equal(finish, case[f"call{call}_finish"])


def _after(case: dict[str, np.ndarray], end: int) -> torch.Tensor:
    return torch.arange(end, case["hidden_states"].shape[1])
