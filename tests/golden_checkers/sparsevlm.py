"""SparseVLM: raters, three steps with recycling, positions; and the clustering alone."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.adapters.call import compact_positions
from mmfast.registry import get
from mmfast.token_pruning.in_llm.sparsevlm import (
    SparseVLM,
    best_and_pool,
    merge_by_density,
    rater_places,
    word_likeness,
)
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Keep
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Run the clustering, or the three steps."""
    if "tokens" in case:
        merged, _ = merge_by_density(torch.from_numpy(case["tokens"])[0], int(case["cluster_num"]))
        np.testing.assert_allclose(merged.numpy(), case["merged"][0], rtol=1e-4, atol=1e-5)
        return
    steps(case, "sparsevlm", compact=True)


def steps(case: dict[str, np.ndarray], name: str, *, compact: bool) -> None:
    """Run the three steps, each from the official states before it."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    embeds = torch.from_numpy(case["inputs_embeds"])[0]
    likeness = word_likeness(embeds[start : start + visual], embeds[start + visual :])
    np.testing.assert_allclose(likeness.numpy(), case["rater_score"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rater_places(likeness).numpy(), case["rater_local_idx"])
    layers = [int(layer) + 1 for layer in case["prune_layers"]]
    method: SparseVLM = get(name).method(
        layers=tuple(layers),
        schedule=tuple(min(int(count), visual) for count in case["schedule"]),
        schedule_of=visual,
        positions="compact" if compact else "keep",
    )
    np.testing.assert_array_equal(method.counts(visual, 32), case["visual_after"])
    memory: dict[str, object] = {}
    alive, origin, places = visual, torch.arange(visual), torch.arange(len(embeds))
    for event in method.events(32):
        layer = event.layer - 1
        attention = torch.from_numpy(case[f"attn_{layer}"])[0]
        hidden = torch.from_numpy(case[f"layer_out_{layer}"])[0]
        candidates = torch.arange(start, start + alive)
        tokens = LayerTokens(
            hidden=hidden,
            candidates=candidates,
            origin=origin,
            media=torch.zeros_like(candidates),
            total=visual,
            media_totals=(visual,),
            places=places,
            attention=DenseAttention.of(attention, width=int(case["head_dim"])),
            embeds=embeds if event.step == 0 else None,
            memory=memory,
        )
        decision = method(tokens, event)
        assert decision is not None
        if method.recycle:
            _clusters(case, method, tokens, event.step)
        states = _after(hidden, candidates, decision)
        np.testing.assert_allclose(states.numpy(), case[f"next_hidden_{layer}"][0], rtol=1e-4, atol=1e-5)
        kept = torch.cat([torch.arange(start), candidates[decision.indices], torch.arange(start + alive, len(hidden))])
        places = places[kept]
        positions = compact_positions(places[None], None, torch.tensor([0]))[0] if compact else places
        np.testing.assert_array_equal(positions.numpy(), case[f"next_pos_{layer}"])
        alive, origin = len(decision), origin[decision.indices]


def _clusters(case: dict[str, np.ndarray], method: SparseVLM, tokens: LayerTokens, step: int) -> None:
    """Compare what is merged, best rated first, and what it becomes."""
    score = method.rate(tokens)
    kept, clusters = method.scheduled(int(case["schedule"][step]), tokens.total, score.numel())
    assert clusters == int(case[f"cluster_n_{step}"])
    states = tokens.hidden[tokens.candidates[best_and_pool(score, kept)[1]]]
    np.testing.assert_allclose(states.numpy(), case[f"cluster_in_{step}"][0], rtol=1e-4, atol=1e-5)
    merged, _ = merge_by_density(states, clusters)
    np.testing.assert_allclose(merged.numpy(), case[f"cluster_out_{step}"][0], rtol=1e-4, atol=1e-5)


def _after(hidden: torch.Tensor, candidates: torch.Tensor, decision: Keep) -> torch.Tensor:
    states = hidden[candidates[decision.indices]].clone()
    if decision.features is not None:
        written = ~decision.features[:, 0].isnan()
        states[written] = decision.features[written]
    return torch.cat([hidden[: candidates[0]], states, hidden[candidates[-1] + 1 :]])
