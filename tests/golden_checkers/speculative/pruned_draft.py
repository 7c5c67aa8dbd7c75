"""Which visual tokens a drafter keeps."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.speculative.drafters.pruned_self import kept_tokens, select


def check(cases: list[dict[str, Any]]) -> None:
    """Compare both stages of the selection."""
    for case in cases:
        scores, expected = torch.tensor(case["scores"], dtype=torch.float64), case["expected"]
        kept = kept_tokens(1.0 - case["drop_rate"], len(scores))
        assert kept == expected["keep"], case
        found = select(scores, kept, case["percentage"])
        assert len(found.attended) == expected["attention_tokens"], case
        assert len(found.uniform) == expected["uniform_tokens"], case
        assert found.attended.tolist() == expected["attention_indices"], case
        assert found.uniform.tolist() == expected["uniform_indices"], case
        assert found.indices.tolist() == expected["keep_indices"], case
