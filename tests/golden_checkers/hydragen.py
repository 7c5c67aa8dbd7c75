"""Hydragen: attention over prefix and suffix, apart and together."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kernels.parts import combine, partial_attention
from mmfast.kernels.shared_prefix import shared_prefix
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare both parts, their combination, and the attention that reads the prefix once."""
    query, (prefix, values) = tensor(case, "query"), (tensor(case, f"prefix_{n}")[0] for n in ("key", "value"))
    suffix = tensor(case, "suffix_key"), tensor(case, "suffix_value")
    group = query.shape[1] // prefix.shape[0]
    wide = [states.repeat_interleave(group, dim=0) for states in (prefix, values)]
    first = partial_attention(query, *wide)
    lengths = torch.from_numpy(case["suffix_len"])
    visible = torch.arange(suffix[0].shape[2]) < lengths[:, None]
    own = [states.repeat_interleave(group, dim=1) for states in suffix]
    second = partial_attention(query, *own, visible[:, None, None])
    for part, name in ((first, "prefix"), (second, "suffix")):
        np.testing.assert_allclose(part[0].numpy(), case[f"{name}_out"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(part[1].numpy(), case[f"{name}_lse"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(combine([first, second])[0].numpy(), case["out"], rtol=1e-5, atol=1e-5)
    whole, _ = shared_prefix(query, (prefix, values), suffix, visible[:, None])
    np.testing.assert_allclose(whole.numpy(), case["out"], rtol=1e-5, atol=1e-5)
