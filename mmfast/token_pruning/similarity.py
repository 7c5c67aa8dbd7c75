"""Small pieces of mathematics that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(features: Tensor) -> Tensor:
    """Scale rows to length one, in float32; rows of zeros stay zero.

    Args:
        features: ``[..., D]``.

    Example:
        >>> normalised(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    values = features.float()
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
