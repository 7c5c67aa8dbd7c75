"""AKI: visual tokens may look ahead at the question that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.layers import LayerMask


@register("aki_mma", stage="in_llm", paper="arXiv 2503.02597", source="sony/aki", vectors=True, training_free=False)
@dataclass(frozen=True)
class AkiMMA(LayerMask):
    """Let each image look at the text of its prompt that follows it (modality-mutual attention).

    Causality says that visual tokens cannot know the question; here their rows also see its columns,
    while among themselves they stay causal. The question is all text after the image up to the end of
    the prompt, so that images of one turn share it; later images stay unseen, and so does what is
    generated. Visual keys and values thus depend on the question: they serve no other one. A model has
    to be trained with this mask. Nothing is removed, so there is no ``keep``.

    Paper: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for
    Multimodal LLMs".
    """

    def visible(self, media: Sequence[Tensor], text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair each image's tokens with the text after them."""
        pairs = [(places, text[text > places.max()]) for places in media if places.numel()]
        return [(rows, columns) for rows, columns in pairs if columns.numel()]


def mutual_mask(real: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Write out a causal mask with further visible pairs, for ONE prompt.

    Args:
        real: ``[n]`` bool, False where a column is padding, which nobody sees.
        pairs: rows and columns (int64 places) that become visible, as :meth:`AkiMMA.visible` gives them.

    Returns:
        bool ``[n, n]``, True = visible.

    Example:
        >>> pairs = AkiMMA().visible([torch.tensor([0])], torch.tensor([1]))
        >>> mutual_mask(torch.ones(2, dtype=torch.bool), pairs).int().tolist()
        [[1, 1], [1, 1]]
    """
    mask = torch.ones(real.numel(), real.numel(), dtype=torch.bool, device=real.device).tril()
    for rows, columns in pairs:
        mask[rows[:, None], columns] = True
    return mask & real
