"""GlobalCom2: what the thumbnail and each crop keep, and the official packing with its quirks."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.globalcom2 import crop_scales, crop_sums, official_lines
from mmfast.token_pruning.before_llm.hired import regions_of, whole_and_crops
from mmfast.tokens import VisualTokens
from support.anyres import anyres

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def check(case: dict[str, np.ndarray]) -> None:
    """Lay the image out as it is left after unpadding, and run the method with the official counts and order."""
    keep, side = float(case["retention"]), int(case["side"])
    grid = int(case["grid_rows"]), int(case["grid_cols"])
    layout, origin = anyres(grid, side, *_padding(case["orig_size_wh"], grid[0] * side, grid[1] * side))
    features, logits = (torch.from_numpy(case[name]).flatten(0, 1)[origin] for name in ("features", "cls_logits"))
    parts = whole_and_crops(layout)
    assert parts is not None
    scales = crop_scales(crop_sums(logits[parts[0]], regions_of(layout, parts[0]), len(parts[1])), keep)
    np.testing.assert_allclose(scales.numpy(), case["crop_scales"], **TOLERANCE)
    assert [crop.numel() for crop in parts[1]] == case["num_valid_per_crop"].tolist()

    method = get("globalcom2").method(keep=keep, compat="official")
    tokens = VisualTokens(features, layout, signals={"logits": logits})
    thumbnail, *ranked = method.ranked(tokens, parts, method.keep_count(len(tokens)))
    np.testing.assert_array_equal(thumbnail.numpy(), case["thumb_keep_idx"])
    for number, (kept, own) in enumerate(zip(ranked, parts[1], strict=True)):
        np.testing.assert_array_equal(
            torch.searchsorted(own, kept).numpy(), _filled(case["crop_keep_idx_in_valid"][number])
        )
        true = origin[kept] - (1 + number) * side * side
        np.testing.assert_array_equal(true.numpy(), _filled(case["crop_keep_idx_true"][number]))
        np.testing.assert_array_equal(true.sort().values.numpy(), np.flatnonzero(case["crop_keep_mask_true"][number]))

    newline = torch.from_numpy(case["image_newline"])[None]
    lines = [torch.cat([features[line], newline]) for line in official_lines(ranked, parts, layout)]
    np.testing.assert_allclose(torch.cat(lines).numpy(), case["packed_crops_official"], **TOLERANCE)
    whole = torch.cat([features[thumbnail], *lines])
    np.testing.assert_allclose(whole.numpy(), case["packed_official"], **TOLERANCE)
    decision = method(tokens)
    if keep < 1.0:
        assert decision is not None
        assert decision.indices.equal(torch.cat([thumbnail, *ranked]).sort().values)
        newlines = len(thumbnail) + np.cumsum([len(line) for line in lines]) - 1
        without = np.delete(case["packed_official"], newlines, axis=0)
        np.testing.assert_allclose(decision.features.numpy(), without, **TOLERANCE)


def _filled(indices: np.ndarray) -> np.ndarray:
    return indices[indices >= 0]


def _padding(size: np.ndarray, high: int, wide: int) -> tuple[int, int]:
    """Rows of padding above and columns of it on the left, in the grid of all crops."""
    width, height = (int(value) for value in size)
    if width / height > wide / high:
        return (high - int(height * wide / width)) // 2, 0
    return 0, (wide - int(width * high / height)) // 2
