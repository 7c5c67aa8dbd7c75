"""gamma-MoD: one converted layer in training and in use, and the rank of attention."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.in_llm.gamma_mod import GammaRouter, attention_rank, gamma_mod_layer, training_route
from mmfast.token_pruning.layers import LayerTokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(case: dict[str, np.ndarray]) -> None:
    """Tell the kinds of file apart by what they hold."""
    if "attention" in case:
        ranks = attention_rank(torch.from_numpy(case["attention"]))
        np.testing.assert_array_equal(ranks.numpy(), case["head_ranks"])
        # The official function prints what it finds.
        for mean in (float(case["mean_rank"]), float(str(case["printed"].reshape(-1)[0]).split()[-1])):
            np.testing.assert_allclose(ranks.double().mean().item(), mean, rtol=1e-4)
        return
    for row in range(case["hidden_states"].shape[0]):
        _layer(case, row)


def _layer(case: dict[str, np.ndarray], row: int) -> None:
    states = torch.from_numpy(case["hidden_states"])[row]
    weight = torch.from_numpy(case["router_weight"])
    router = GammaRouter(states.shape[-1])
    router.load_state_dict({"router.weight": weight})
    with torch.no_grad():
        logits = router(states)
    probability = logits.softmax(dim=-1)[:, 1]
    np.testing.assert_allclose(probability.numpy(), case["route_prob"][row], **CLOSE)
    if "aux_loss" in case:
        protected = torch.arange(states.shape[0]) >= int(case["image_and_instruction_len"])
        part = training_route(probability, protected)
    else:
        part = _used(states, weight)
    places: list[Tensor] = []

    def attend(own: Tensor, chosen: Tensor) -> Tensor:
        places.append(chosen)
        return own @ torch.from_numpy(case["attn_mat"])

    def feed(own: Tensor) -> Tensor:
        return torch.tanh(own @ torch.from_numpy(case["mlp_mat"]))

    output, loss = gamma_mod_layer(states, logits, part, attend, feed)
    assert places[0].numel() == int(np.atleast_1d(case["n_selected"])[row])
    np.testing.assert_array_equal(np.arange(places[0].numel()), case["position_ids"][row])
    np.testing.assert_allclose(output.numpy(), case["output"][row], **CLOSE)
    if "aux_loss" in case:
        np.testing.assert_allclose(loss.item(), float(case["aux_loss"]), **CLOSE)


def _used(states: Tensor, weight: Tensor) -> Tensor:
    """Who takes part by the method itself, which reads its router from a file."""
    everything = torch.arange(states.shape[0])
    tokens = LayerTokens(
        hidden=states,
        candidates=everything,
        origin=everything,
        media=everything * 0,
        total=states.shape[0],
        media_totals=(states.shape[0],),
        normed=states,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "router.safetensors")
        save_file({"router.weight": weight}, path)
        route = get("gamma_mod").method(weights=path).route(tokens, 3, 32)
    part = torch.zeros(states.shape[0], dtype=torch.bool)
    part[route.selected] = True
    return part
