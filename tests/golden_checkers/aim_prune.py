"""AIM inside the language model: importance of tokens, and what each layer of the published schedule leaves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmfast.token_pruning.in_llm.aim_prune import AIMPrune, page_rank
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the importance of a layer, or the survivors of all layers."""
    if "masked_logits" in case:
        _importance(case)
    else:
        _schedule(case)


def _importance(case: dict[str, np.ndarray]) -> None:
    logits = torch.from_numpy(case["masked_logits"])
    valid = torch.from_numpy(case.get("valid", np.ones(case["importance"].shape, dtype=bool)))
    for row, real in enumerate(valid):
        found = page_rank(
            DenseAttention.of_logits(logits[row][:, real][:, :, real]),
            iterations=int(case["iters"]),
            temperature=float(case["tau"]),
            damping=float(case["damping"]),
        )
        np.testing.assert_allclose(found.numpy(), case["importance"][row][real.numpy()], rtol=1e-3, atol=1e-5)
        assert not case["importance"][row][~real.numpy()].any()


class _Given(AIMPrune):
    """The method with the importance of the tokens given."""

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        importance: Tensor = tokens.memory["importance"][tokens.candidates]
        return importance


def _schedule(case: dict[str, np.ndarray]) -> None:
    """Drop for real what the official code masks: padding never was there, text stays, survivors move together."""
    importance = torch.from_numpy(case["importance_per_layer"])
    depth, batch, _ = importance.shape
    for row in range(batch):
        real = torch.from_numpy(case["attention_mask"])[row].bool()
        start, end, _ = case["boundaries"][row].tolist()
        places = torch.arange(importance.shape[2])
        visual = real & (places >= start) & (places < end)
        method = _Given()
        alive = real.clone()
        for layer in range(depth):
            if layer + 1 < depth:
                _step(method, method.events(depth)[layer], alive, visual, importance[layer, row])
            np.testing.assert_array_equal(alive.numpy(), case["valid_mask_after_layer"][layer, row])
            assert int((alive & visual).sum()) == int(case["visible_visual_after_layer"][layer, row])


def _step(method: AIMPrune, event: LayerEvent, alive: Tensor, visual: Tensor, importance: Tensor) -> None:
    total = int(visual.sum())
    places = alive.nonzero().squeeze(-1)
    candidates = visual[places].nonzero().squeeze(-1)
    origin = (visual.cumsum(0) - 1)[places[candidates]]
    decision = method(
        LayerTokens(
            hidden=torch.zeros(places.numel(), 1),
            candidates=candidates,
            origin=origin,
            media=torch.zeros_like(origin),
            total=total,
            media_totals=(total,),
            memory={"importance": importance[places]},
        ),
        event,
    )
    if decision is not None:
        alive[places[candidates]] = False
        alive[places[candidates[decision.indices]]] = True
