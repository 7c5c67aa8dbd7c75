"""FEATHER: both scores, how many are chosen, and what enters the layers after both steps."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange

from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.feather import unrotated_score
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from mmfast.tokens import Layout


def check(case: dict[str, np.ndarray]) -> None:
    """Run both steps from the hidden states before them."""
    start, side = int(case["image_start"]), int(case["grid_side"])
    visual = side * side
    first, second = (int(layer) for layer in case["prune_layers"])
    method = get("feather").method(
        keep=None,
        layers=(first, second),
        stride=int(case["stride"]),
        drop=float(case["prune_ratio"]),
    )
    positions, origin = None, torch.arange(visual)
    for step, layer in enumerate((first, second)):
        hidden = torch.from_numpy(case[f"hidden_in_{layer - 1}"])[0]
        positions = torch.arange(len(hidden)) if positions is None else positions
        view = _view(case, hidden, layer - 1)
        candidates = torch.arange(start, start + origin.numel())
        tokens = LayerTokens(
            hidden=hidden,
            candidates=candidates,
            origin=origin,
            media=torch.zeros_like(candidates),
            total=visual,
            media_totals=(visual,),
            layouts=(Layout.grid(side, side),),
            attention=view,
        )
        score = unrotated_score(view, tokens.last_token, candidates)
        np.testing.assert_allclose(score.numpy(), case[f"score_{step}"], rtol=1e-4, atol=1e-5)
        assert method.best_count(len(score), last=step == 1) == max(1, int(case[f"n_top_{step}"]))
        chosen = method.choose(tokens, None, LayerEvent(layer, step, 32))
        text = torch.tensor([p for p in range(len(hidden)) if not start <= p < start + origin.numel()])
        keep = torch.cat([candidates[chosen], text]).sort().values
        positions, origin = positions[keep], origin[chosen]
        np.testing.assert_array_equal(origin.numpy(), case[f"kept_original_{step}"])
        np.testing.assert_array_equal(positions.numpy(), case[f"pos_after_{layer}"])
        # The stub layer between what is scored and what is gathered moves each state a little: among all of
        # them the gathered one must still be its nearest.
        entering = torch.from_numpy(case[f"hidden_into_{layer}"])[0]
        np.testing.assert_array_equal(torch.cdist(entering, hidden).argmin(dim=1).numpy(), keep.numpy())


def _view(case: dict[str, np.ndarray], hidden: torch.Tensor, layer: int) -> AttentionView:
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    parts = []
    for name, heads in (("q", int(case["num_heads"])), ("k", int(case["num_kv_heads"]))):
        weight = torch.from_numpy(case[f"{name}_weight_{layer}"])
        parts.append(rearrange(normed @ weight.T, "n (h d) -> h n d", h=heads))
    return AttentionView(*parts)
