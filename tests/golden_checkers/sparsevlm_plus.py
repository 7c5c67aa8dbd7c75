"""SparseVLM+: raters and three steps without recycling, at original positions."""

from __future__ import annotations

import numpy as np

from golden_checkers.sparsevlm import steps


def check(case: dict[str, np.ndarray]) -> None:
    """Run the three steps."""
    steps(case, "sparsevlm_plus", compact=False)
