"""LOOK-M: what stays, given the attention, and the three ways to merge."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.lookm import LookM, most_similar, similar_enough
from support.entries import Case, tensor

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VARIANTS = {
    "pivot": ("pivotal", None),
    "weighted": ("weighted", None),
    "averaged": ("averaged", None),
    "averaged_official": ("averaged", "official"),
}


def check(case: Case) -> None:
    """Run the method with the attention that was given, once per way to merge."""
    scores, keys, values = (tensor(case, name) for name in ("scores", "key", "value"))
    length = scores.shape[-1]
    visual = torch.zeros(length, dtype=torch.bool)
    for start in case.get("image_starts", []):
        visual[int(start) : int(start) + int(case["image_len"])] = True
    heavy, recent = (int(length * float(case[f"{name}_ratio"])) for name in ("heavy", "recent"))
    prior = "image_starts" in case

    class Given(LookM):
        def scores(self, entries: Entries) -> torch.Tensor:
            return scores

    def method(merge: str = "none", compat: str | None = None) -> LookM:
        return Given(heavy + recent, recent / (heavy + recent), merge, prior, compat)

    entries = Entries.of(keys[0], values[0], visual=visual)
    retained = method()(entries)
    mask = torch.ones_like(scores, dtype=torch.bool) if retained is None else retained.by_head(len(scores))
    np.testing.assert_array_equal(mask.numpy(), case["keep_mask"])
    for name, options in VARIANTS.items():
        if f"key_{name}" not in case:
            continue
        merged = method(*options)(entries)
        for kind, states in (("key", keys[0]), ("value", values[0])):
            changed = None if merged is None else getattr(merged, f"{kind}s")
            found = (states if changed is None else changed)[mask].view(*mask.shape[:1], -1, states.shape[-1])
            np.testing.assert_allclose(found.numpy(), case[f"{kind}_{name}"][0], **TOLERANCE)
    if "nearest_kept" in case and not mask.all():
        places = [part.nonzero()[:, 1].view(len(mask), -1) for part in (mask, ~mask)]
        cosine, target = most_similar(keys[0], *places)
        np.testing.assert_array_equal(target.numpy(), case["nearest_kept"])
        np.testing.assert_allclose(cosine.numpy(), case["nearest_cosine"], **TOLERANCE)
        np.testing.assert_array_equal(similar_enough(cosine).numpy(), case["merge_filter"])
