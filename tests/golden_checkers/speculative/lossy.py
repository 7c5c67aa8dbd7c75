"""Rules that change the answer."""

from __future__ import annotations

import math
from typing import Any

from mmfast.speculative.verify import typical_lossy
from support.acceptance import doubles


def check(case: dict[str, Any]) -> None:
    """Compare thresholds and the tokens that pass."""
    for item in case["typical_acceptance"]:
        law, expected = doubles(item["p"]), item["expected"]
        threshold, passing = typical_lossy(law, epsilon=item["epsilon"], delta=item["delta"])
        assert abs(threshold - expected["threshold"]) <= 1e-12
        assert passing.nonzero().flatten().tolist() == expected["accepted_tokens"]
        # Without a floor, and with a delta of 1, the threshold is the exponential of the entropy.
        alone, _ = typical_lossy(law, epsilon=math.inf, delta=1.0)
        assert abs(-math.log(alone) - expected["entropy"]) <= 1e-12
