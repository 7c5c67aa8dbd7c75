"""p-MoD: one routed layer, and the schedule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.in_llm.p_mod import PModRouters, p_mod_layer, prd_ratios, taking_part, tanh_norm


def check(case: dict[str, np.ndarray]) -> None:
    """Tell the kinds of file apart by what they hold."""
    if "cos_ratio" in case:
        _schedule(case)
    else:
        _layer(case)


def _schedule(case: dict[str, np.ndarray]) -> None:
    depth, total = len(case["cos_ratio"]), int(case["vision_tokens"])
    bounds = {"highest": float(case["max_ratio"]), "lowest": float(case["min_ratio"])}
    mean = float(case["mean_ratio"])
    for decay, name in (("cosine", "cos"), ("linear", "linear")):
        raw = prd_ratios(depth, decay, mean=mean, highest=np.inf, lowest=-np.inf)
        ratios = np.array(prd_ratios(depth, decay, mean=mean, **bounds))
        np.testing.assert_allclose(raw, case[f"shifted{name}_raw"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ratios, case[f"{name}_ratio"], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(ratios < 1.0, case[f"{name}_is_mod_layer"])
    if (mean, *bounds.values()) == (0.5, 0.85, 0.15):
        # The average of the published schedule brings the published schedule back.
        method = get("p_mod").method(keep=float(case["cos_ratio"].mean()))
        np.testing.assert_array_equal(method.keep_counts(total, 0, depth), case["kept_per_layer_cos"])
        assert method.layers_of(depth) == case["cos_is_mod_layer"].nonzero()[0].tolist()
    kept = [max(1, int(ratio * total)) for ratio in prd_ratios(depth, mean=mean, **bounds)]
    np.testing.assert_array_equal(kept, case["kept_per_layer_cos"])


def _layer(case: dict[str, np.ndarray]) -> None:
    given = {name: torch.from_numpy(value) for name, value in case.items() if value.ndim}
    ratio, scale, shift = float(case["ratio"]), float(case["alpha"]), float(case["beta"])
    routers = PModRouters(given["hidden_states"].shape[-1], [0])
    routers.load_state_dict({"layers.0.weight": given["router_weight"], "layers.0.bias": given["router_bias"]})

    def attend(states: Tensor, places: Tensor) -> Tensor:
        return states @ given["attn_mat"]

    def feed(states: Tensor) -> Tensor:
        return torch.tanh(states @ given["mlp_mat"])

    close = {"rtol": 1e-4, "atol": 1e-5}
    for row, states in enumerate(given["hidden_states"]):
        real = given["attention_mask"][row].bool()
        states, visual = states[real], given["mod_target_mask"][row][real]
        with torch.no_grad():
            if (scale, shift) == (0.2, 1.0):
                weights = routers(states, 0)
            else:
                weights = tanh_norm(states @ given["router_weight"][0] + given["router_bias"], scale, shift)
            output = p_mod_layer(states, visual, weights, ratio, attend, feed)
        places = taking_part(visual, weights, ratio)
        expected = given["token_weights"][row][real]
        np.testing.assert_allclose(weights[visual].numpy(), expected[visual].numpy(), **close)
        np.testing.assert_array_equal(places.numpy(), case["kept_position_ids"][row, : places.numel()])
        np.testing.assert_allclose(states[places].numpy(), case["kept_tokens_in"][row, : places.numel()], **close)
        np.testing.assert_allclose(output.numpy(), given["output"][row][real].numpy(), **close)
    counts = [
        taking_part(target[real.bool()], torch.ones(int(real.sum())), ratio).numel()
        for target, real in zip(given["mod_target_mask"], given["attention_mask"], strict=True)
    ]
    assert max(counts) == case["kept_tokens_in"].shape[1]
