"""Free Video-LLM: the frames that fit the question, and the tokens of all three paths in the official order."""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from mmfast.token_pruning.before_llm.free_video_llm import averaged, cropped_pairs, frames_of_paths

SPEC = re.compile(r"slow_(\d+)frms_\w+_roi(\d+)-middle_(\d+)frms_\w+-fast_(\d+)frms_(\d+)x(\d+)")


def check(case: dict[str, np.ndarray]) -> None:
    """Compare at the tolerance of the vectors."""
    found = SPEC.fullmatch(str(case["spec"]))
    assert found is not None
    slow, region, middle, fast, rows, columns = map(int, found.groups())
    features, patches = torch.from_numpy(case["features"]), torch.from_numpy(case["patch_embeds"])
    side = math.isqrt(features.shape[1])
    own, seen = (values.unflatten(1, (side, side)) for values in (features, patches))
    question = torch.from_numpy(case["text_embed"])[0]
    frames = torch.from_numpy(case["frame_embeds"])
    detailed, coarse = frames_of_paths(frames, question, (slow, middle, fast), official=True)
    assert detailed[: min(slow, len(frames))] == case["slow_frame_idx"].tolist()
    parts = [cropped_pairs(own[t], seen[t], question, region / 10, official=True) for t in detailed]
    parts += [averaged(own[t], rows, columns) for t in coarse]
    out = torch.cat([part.features for part in parts]).numpy()
    np.testing.assert_allclose(out, case["out_features"], atol=1e-5, rtol=1e-5)
