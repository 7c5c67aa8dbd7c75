"""GlobalCom2: what the thumbnail and each crop keep, and the official packing with its quirks."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.token_pruning.before_llm.globalcom2 import crop_scales, crop_sums, enlarge, joint_scores
from mmfast.token_pruning.before_llm.hired import region_grid
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import Layout


def check(case: dict[str, np.ndarray]) -> None:
    """Choose with official counts, which are cut off tile by tile, and pack as the official code does."""
    features, logits = torch.from_numpy(case["features"]), torch.from_numpy(case["cls_logits"])
    columns, rows, side = (int(case[name]) for name in ("grid_cols", "grid_rows", "side"))
    keep, crops = float(case["retention"]), rows * columns
    thumbnail = highest_first(logits[0], int(side * side * keep))
    np.testing.assert_array_equal(thumbnail.numpy(), case["thumb_keep_idx"])
    layout = Layout.grid(side, side)
    regions = region_grid(layout.row, layout.col, (side, side), (rows, columns))
    scales = crop_scales(crop_sums(logits[0], regions, crops), keep)
    np.testing.assert_allclose(scales.numpy(), case["crop_scales"], atol=1e-5, rtol=1e-5)
    valid = _valid(case["orig_size_wh"], rows * side, columns * side)
    high = int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())
    enlarged = torch.zeros(rows * side, columns * side)
    enlarged[valid] = enlarge(logits[0], side, high).flatten()
    stored = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    packed = torch.zeros(rows * side, columns * side, features.shape[2])
    for crop in range(crops):
        top, left = crop // columns * side, crop % columns * side
        window = slice(top, top + side), slice(left, left + side)
        places = valid[window].flatten().nonzero().squeeze(-1)
        assert places.numel() == int(case["num_valid_per_crop"][crop])
        score = joint_scores(logits[1 + crop, places], enlarged[window].flatten()[places])
        count = int(places.numel() * float(scales[crop]))
        chosen = highest_first(score, count)
        np.testing.assert_array_equal(np.sort(chosen.numpy()), _padded(case["crop_keep_idx_in_valid"][crop]))
        true = places[chosen]
        np.testing.assert_array_equal(np.sort(true.numpy()), _padded(case["crop_keep_idx_true"][crop]))
        mask = torch.zeros(side * side, dtype=torch.bool)
        mask[true] = True
        np.testing.assert_array_equal(mask.numpy(), case["crop_keep_mask_true"][crop].astype(bool))
        # The official code takes places in the list of valid tokens for places in the crop.
        wrong = torch.zeros(side * side, features.shape[2])
        wrong[chosen] = features[1 + crop, true]
        kept = torch.zeros(side * side, dtype=torch.bool)
        kept[chosen] = True
        packed[window] = wrong.view(side, side, -1)
        stored[window] = kept.view(side, side)
    newline = torch.from_numpy(case["image_newline"])[None]
    lines = [torch.cat([packed[row, stored[row]], newline]) for row in range(rows * side)]
    np.testing.assert_allclose(torch.cat(lines).numpy(), case["packed_crops_official"], atol=1e-5, rtol=1e-5)
    whole = torch.cat([features[0, thumbnail], *lines])
    np.testing.assert_allclose(whole.numpy(), case["packed_official"], atol=1e-5, rtol=1e-5)


def _padded(indices: np.ndarray) -> np.ndarray:
    return np.sort(indices[indices >= 0])


def _valid(size: np.ndarray, high: int, wide: int) -> torch.Tensor:
    """What is left after unpadding, bool ``[rows, columns]``."""
    width, height = float(size[0]), float(size[1])
    valid = torch.zeros(high, wide, dtype=torch.bool)
    if width / height > wide / high:
        padding = (high - int(height * wide / width)) // 2
        valid[padding : high - padding] = True
    else:
        padding = (wide - int(width * high / height)) // 2
        valid[:, padding : wide - padding] = True
    return valid
