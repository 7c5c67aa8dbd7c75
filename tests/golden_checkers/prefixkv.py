"""PrefixKV: how many entries each layer drops, which, and what decode steps evict."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.prefixkv import PrefixKV, Received, prefix_search
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Settle a prompt whose attention is given, once measured and once with the profile, and generate."""
    scores = tensor(case, "scores")
    layers, length = scores.shape
    method = PrefixKV(keep=1 - float(case["drop_ratio"]), start=int(case["start_size"]))
    target = float(case["target_forget"])
    assert layers * length * float(case["drop_ratio"]) == target
    np.testing.assert_array_equal(prefix_search(list(scores), target, method.start + 1), case["forget_raw"])
    np.testing.assert_allclose(
        np.array(method.measured(list(scores))) / length, case["layer_ratios"], rtol=1e-5, atol=1e-5
    )
    check_prompt(case, method, scores)
    check_prompt(case, PrefixKV(start=method.start, ratios=tuple(case["layer_ratios"].tolist())), scores)


def check_prompt(case: Case, method: PrefixKV, scores: torch.Tensor) -> None:
    """Compare what stays of the prompt and after each step."""
    layers, length = scores.shape

    class Given(PrefixKV):
        def scores(self, entries: Entries) -> torch.Tensor:
            return scores[entries.layer]

    method = Given(method.keep, method.start, method.distance, method.ratios)
    states = torch.zeros(1, length, 1)
    prompt = [Entries.of(states, states, layer=layer, depth=layers) for layer in range(layers)]
    observed: list[Received] = [method.observe(entries) for entries in prompt]
    settled = method.settle(observed)
    kept = torch.stack([(layer or Retained(torch.ones(length, dtype=torch.bool))).kept for layer in settled])
    np.testing.assert_array_equal(kept.numpy(), case["keep_mask"])
    np.testing.assert_array_equal(kept.sum(dim=-1).numpy(), case["kept_per_layer"])
    # The official code sets no points where nothing is dropped.
    if not kept.all():
        places = [int(entries.memory["place"]) for entries in prompt]
        np.testing.assert_array_equal(places, case["eviction_point"])

    steps = int(case["decode_steps"])
    stored = [row.nonzero().squeeze(-1) for row in kept]
    lengths = np.zeros((steps, layers), dtype=np.int64)
    for added in range(1, steps + 1):
        for layer in range(layers):
            stored[layer] = torch.cat([stored[layer], torch.tensor([length + added - 1])])
            new = torch.zeros(1, len(stored[layer]), 1)
            step = Step(new, new, new[:, :1], length + added, added, layer, layers, memory=prompt[layer].memory)
            mask = method.step(step)
            if mask is not None:
                stored[layer] = stored[layer][mask]
            lengths[added - 1, layer] = len(stored[layer])
    np.testing.assert_array_equal(lengths, case["decode_lengths"])
    after = torch.stack([torch.isin(torch.arange(length + steps), row) for row in stored])
    np.testing.assert_array_equal(after.numpy(), case["keep_mask_after_decode"])
