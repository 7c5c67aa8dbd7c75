"""InfiniPot-V: what stays of a video, in each layer."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Retained
from mmfast.registry import get
from support.entries import Case, indices, tensor


def check(case: Case) -> None:
    """Compare every layer."""
    keys, values = tensor(case, "key"), tensor(case, "value")
    size, system = int(case["tokens_per_frame"]), int(case["system_len"])
    frame = torch.cat([torch.full((system,), -1), torch.arange(int(case["frames"])).repeat_interleave(size)])
    visual = frame >= 0
    assert len(frame) == keys.shape[2]
    method = get("infinipot_v").method(
        keep=int(case["keep_frames"]) * size,
        temporal=float(case["tar_ratio"]),
        recent=float(case["query_ratio"]),
        pooling=bool(case["adaptive_pooling"]),
        rows=int(case["patch_rows"]),
    )
    for layer, expected in enumerate(case["keep_idx"]):
        entries = Entries.of(
            keys[layer],
            values[layer],
            visual=visual,
            media=visual.long() - 1,
            frame=frame,
            layer=layer,
            depth=len(keys),
        )
        retained = method(entries) or Retained(visual | True)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), expected)
