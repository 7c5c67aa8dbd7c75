"""FlowCut inside the language model: both relations, the score, and what is kept."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.flowcut_llm import relations
from mmfast.token_pruning.layers import LayerEvent, LayerTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare prompt by prompt."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    candidates = torch.arange(start, start + visual)
    row = int(case["last_instruct_pos"]) - 1
    method = get("flowcut_llm").method(keep=int(case["target"]))
    for prompt in range(case["query"].shape[0]):
        view = AttentionView(*(torch.from_numpy(case[name])[prompt] for name in ("query", "key", "value")))
        relation, semantic, _ = relations(view, row, candidates)
        np.testing.assert_allclose(relation.numpy(), case["relation"][prompt], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(semantic.numpy(), case["semantic"][prompt], rtol=1e-4, atol=1e-5)
        tokens = LayerTokens(
            hidden=torch.zeros(view.length, 1),
            candidates=candidates,
            origin=candidates - start,
            media=torch.zeros_like(candidates),
            total=visual,
            media_totals=(visual,),
            last=row,
            attention=view,
        )
        event = LayerEvent(1, 0, 32)
        np.testing.assert_allclose(method.score(tokens, event).numpy(), case["score"][prompt], rtol=1e-4, atol=1e-5)
        decision = method(tokens, event)
        kept = torch.arange(visual) if decision is None else decision.indices
        np.testing.assert_array_equal(kept.numpy(), case["keep_local"][prompt])
