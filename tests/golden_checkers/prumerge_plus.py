"""PruMerge+: as PruMerge, with evenly spaced tokens."""

from __future__ import annotations

import numpy as np

from golden_checkers import prumerge


def check(case: dict[str, np.ndarray]) -> None:
    """Run the checks of PruMerge with the choice of PruMerge+."""
    prumerge.check(case, "prumerge_plus")
