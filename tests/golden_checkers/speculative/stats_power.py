"""What common mistakes of verification do to the answer, and how many rounds show it."""

from __future__ import annotations

import math
from typing import Any

import torch

from support.acceptance import Step, doubles, mistakes, warped

CLOSE = {"atol": 1e-12, "rtol": 0.0}
NONCENTRALITY = 48.0  # from which the file has its sample sizes, for 7 degrees of freedom


def check(case: dict[str, Any]) -> None:
    """Make every mistake on purpose and compare its law with the one given."""
    p, q, temperature = doubles(case["p"]), doubles(case["q"]), case["temperature"]
    assert case["correct_output_equals_p"]
    torch.testing.assert_close(Step().law(p, q), p, **CLOSE)
    warm = warped(p, temperature), warped(q, temperature)
    torch.testing.assert_close(Step().law(*warm), warm[0], **CLOSE)
    for name, bug in case["bugs"].items():
        target, drafter = warm if name == "temperature_forgotten_in_residual" else (p, q)
        torch.testing.assert_close(target, doubles(bug["target"]), **CLOSE)
        expected = doubles(bug["output_distribution"])
        # Which probability counts as low is not given: one of the drafter's must explain what came out.
        gaps = [
            float((mistakes((p, q), threshold)[name].law(target, drafter) - expected).abs().max())
            for threshold in (*q.tolist(), math.inf)
        ]
        assert min(gaps) <= 1e-12, f"{name}: off by {min(gaps)}"
        effect = float(((expected - target) ** 2 / target).sum())
        assert abs(float((expected - target).abs().sum()) / 2 - bug["tv_distance"]) <= 1e-12, name
        assert abs(effect - bug["chi2_effect"]) <= 1e-12, name
        assert math.ceil(NONCENTRALITY / effect) == bug["samples_for_power_0_99_at_1e_4"], name
