"""VL-Cache: sparsity and importance of every layer, what each gets, and what stays."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.eviction.vl_cache import VLCache, after_vision
from support.entries import Case, rows


def check(case: Case) -> None:
    """Compare all layers of one prompt."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    keep, length = case["keep"], case["key"].shape[-2]
    method = VLCache(
        keep=int(keep) if np.issubdtype(keep.dtype, np.integer) else float(keep),
        window="layer" if bool(case["window_per_layer"]) else "shared",
        per_head=bool(case["head_adaptive"]),
        per_layer=bool(case["layer_adaptive"]),
    )
    visual = torch.arange(length) < length - int(case["post_vision_len"])
    # Layers stand where other cases have prompts.
    layers = [entries for _, entries in rows(case, visual)]
    found = [after_vision(entries) for entries in layers]
    np.testing.assert_allclose(torch.stack([sparsity for sparsity, _ in found]), case["sparsity"], **tolerance)
    np.testing.assert_allclose(torch.stack([importance for _, importance in found]), case["importance"], **tolerance)
    observed = [method.observe(entries) for entries in layers]
    fractions = method.fractions([layer.sparsity for layer in observed], [length] * len(layers))
    np.testing.assert_allclose(fractions, case["budget_fraction"], **tolerance)
    # Where everything is to be kept the method leaves the prompt alone, which the source does not.
    masks = [method.choose(layer.importance, fraction) for layer, fraction in zip(observed, fractions, strict=True)]
    heads = layers[0].heads
    for number, mask in enumerate(masks):
        whole = mask if mask.ndim == 2 else mask.expand(heads, -1)
        np.testing.assert_array_equal(whole.numpy(), case["keep_mask"][number])
        assert set(whole.sum(dim=-1).tolist()) == {int(case["kept_per_layer"][number])}
    if method.keep_count(length) < length:
        for number, retained in enumerate(method.settle(observed)):
            everything = bool(case["keep_mask"][number].all())
            assert (retained is None) == everything
            if retained is not None:
                np.testing.assert_array_equal(retained.by_head(heads).numpy(), case["keep_mask"][number])
