"""KIVI: codes, scales, what they restore, and how many entries are packed when."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare every prompt of the batch, or the schedule."""
    if "lengths" in case:
        check_schedule(case)
        return
    group = int(case["group_size"])
    method = get("kivi").method(bits=int(case["bits"]), group=group, residual=group)
    for side, axis in (("key", 1), ("value", 2)):
        for row, states in enumerate(tensor(case, side)):
            block = method.pack(states, side, None)
            np.testing.assert_array_equal(block.words.numpy(), case[f"{side}_codes"][row])
            for name, found in (("scale", block.scale), ("min", block.low)):
                expected = case[f"{side}_{name}"][row]
                np.testing.assert_allclose(found.unsqueeze(axis + 1).numpy(), expected, rtol=1e-5, atol=1e-5)
            restored = block.restore().numpy()
            np.testing.assert_allclose(restored, case[f"{side}_dequant"][row], rtol=1e-5, atol=1e-5)


def check_schedule(case: Case) -> None:
    """Count packed and loose entries after the prompt and after each step."""
    residual = int(case["residual_length"])
    method = get("kivi").method(residual=residual, group=residual)
    packed, loose = {"key": 0, "value": 0}, {"key": int(case["prefill_len"]), "value": int(case["prefill_len"])}
    lengths = []
    for step in range(int(case["steps"]) + 1):
        for side in packed:
            loose[side] += step > 0
            due = method.due(loose[side], side)
            packed[side] += due
            loose[side] -= due
        lengths.append([packed["key"], loose["key"], packed["value"], loose["value"]])
    np.testing.assert_array_equal(lengths, case["lengths"])
