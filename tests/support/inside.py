"""The tokens of one prompt inside the language model, built by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.token_pruning.layers import LayerTokens


def layer_tokens(
    length: int,
    candidates: Sequence[int],
    *,
    media_totals: Sequence[int] | None = None,
    hidden: Tensor | None = None,
    **more: Any,
) -> LayerTokens:
    """Build a prompt of ``length`` tokens from which nothing has been dropped yet."""
    totals = tuple(media_totals or (len(candidates),))
    return LayerTokens(
        hidden=torch.zeros(length, 4) if hidden is None else hidden,
        candidates=torch.tensor(candidates),
        origin=torch.arange(len(candidates)),
        media=torch.repeat_interleave(torch.arange(len(totals)), torch.tensor(totals)),
        total=len(candidates),
        media_totals=totals,
        **more,
    )
