"""AKI: the mask in which visual tokens see the question."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.in_llm.aki_mma import mutual_mask


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the mask that the method's pairs make."""
    real = torch.from_numpy(np.atleast_2d(case["attention_mask_2d"])[0]).bool()
    image, start, end = (int(case[name]) for name in ("image_start", "text_start", "text_end"))
    # What follows the question is the answer, which is no text of the prompt.
    text = torch.tensor([place for place in range(end) if real[place] and not image <= place < start])
    pairs = get("aki_mma").method().visible([torch.arange(image, start)], text.long())
    np.testing.assert_array_equal(mutual_mask(real, pairs)[None].numpy(), case["mask"].astype(bool))
