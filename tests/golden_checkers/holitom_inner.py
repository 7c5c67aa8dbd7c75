"""HoliTom inside the language model: what is kept, and the states after merging."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.layers import LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Let the attention of the last query be all that is known."""
    states = torch.from_numpy(case["hidden_states"])[0]
    start, visual = int(case["visual_start"]), int(case["visual_length"])
    length, candidates = len(states), torch.arange(start, start + visual)
    row = torch.from_numpy(case["attention_last_query"])
    weights = torch.zeros(len(row), length, length)
    weights[:, -1] = row
    tokens = LayerTokens(
        hidden=states,
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        attention=DenseAttention.of(weights),
    )
    method = get("holitom_inner").method(keep=1.0 - float(case["drop_ratio"]))
    decision = method(tokens, method.events(28)[0])
    kept, merged = torch.arange(visual), torch.full_like(states[candidates], float("nan"))
    if decision is not None:
        kept, merged = decision.indices, decision.features
    own = states[candidates[kept]]
    own = torch.where(merged.isnan(), own, merged)
    places = torch.cat([torch.arange(start), candidates[kept], torch.arange(start + visual, length)])
    np.testing.assert_array_equal(places.numpy(), case["keep_idx"])
    output = torch.cat([states[:start], own, states[start + visual :]])
    np.testing.assert_allclose(output.numpy(), case["out_hidden"], atol=1e-4, rtol=1e-4)
