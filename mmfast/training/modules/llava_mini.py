"""LLaVA-Mini's pre-fusion: text takes up the image in a few layers, and the language model reads a few tokens.

The compressor beside it is the method ``llava_mini_resampler``. What the language model then reads depends on the
question: nothing of an image can be kept for the next one.

The paper trains in two stages: the projector alone on captions, without these modules; then everything but the vision
encoder on instructions (released script: learning rate 1e-4, two epochs, gradients clipped at 0.5). New layers with
random weights that are not trained give noise.

Paper: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token" (arXiv 2501.03895).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.training.objective import IGNORED

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Runs a layer: (layer, states ``[B, n, D]``, bool mask ``[B, 1, n, n]`` of who is seen, positions ``[B, n]``)."""


def _plain(layer: nn.Module, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    found: Any = layer(states, attention_mask=mask, position_ids=positions)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


class PreFusion(nn.Module):
    """Decoder layers over full image, compressed image and text, without a norm behind them.

    Args:
        layers: new layers of the class and sizes of the language model's; the paper has 4.
        call: runs one of them; by default ``layer(states, attention_mask=mask, position_ids=positions)``. Layers of
            transformers also want rotary embeddings, and some kinds of attention a mask of numbers.

    Example:
        >>> class Mean(nn.Module):
        ...     def forward(self, states, attention_mask, position_ids):
        ...         seen = attention_mask[:, 0].float()
        ...         return states + seen @ states / seen.sum(dim=-1, keepdim=True)
        >>> fusion = PreFusion([Mean()])
        >>> visual, fused = fusion(torch.randn(1, 9, 4), torch.randn(1, 1, 4), torch.randn(1, 5, 4))
        >>> visual.shape, fused.shape
        (torch.Size([1, 1, 4]), torch.Size([1, 5, 4]))
    """

    def __init__(self, layers: Iterable[nn.Module], call: Call = _plain) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.call = call

    def forward(
        self, full: Tensor, compressed: Tensor, text: Tensor, raw: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let compressed image and text read the full image, the text all of it.

        Args:
            full: ``[B, N, D]``, all projected tokens of the image; at high resolution those of the tiles, then those
                of the whole.
            compressed: ``[B, C, D]``, what the compressor made of it, projected.
            text: ``[B, S, D]`` embeddings of the prompt, and in training of the answer. They are not trained here.
            raw: bool ``[B, S]``, rows that keep their embeddings and that nobody sees, see :func:`raw_rows`; None =
                none of them.

        Returns:
            Compressed image ``[B, C, D]`` and text ``[B, S, D]``.
        """
        text = text.detach()
        raw = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device) if raw is None else raw
        states = torch.cat([full, compressed, text], dim=1)
        before = full.shape[1] + compressed.shape[1]
        seen = torch.cat([raw.new_ones(raw.shape[0], before), ~raw], dim=1)
        positions = (seen.long().cumsum(dim=1) - 1).clamp_min(0)
        length = states.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        # A row that nobody sees still sees itself: its softmax must not be empty.
        own = torch.eye(length, dtype=torch.bool, device=states.device)
        mask = (causal & seen[:, None, :] | own)[:, None]
        for layer in self.layers:
            states = self.call(layer, states, mask, positions)
        visual, fused = states[:, full.shape[1] : before], states[:, before:]
        return visual, torch.where(raw[..., None], text, fused)


def raw_rows(input_ids: Tensor, labels: Tensor | None = None, placeholder: int | None = None) -> Tensor:
    """Say which tokens take no part in pre-fusion: padding, placeholders of images, and answers in training.

    Args:
        input_ids: int64 ``[B, S]``; ids of 0 and below count as padding or placeholders, as in the official code.
        labels: int64 ``[B, S]``, -100 where nothing is to be learned; None outside training.
        placeholder: another id that stands for an image.

    Returns:
        bool ``[B, S]``.

    Example:
        >>> raw_rows(torch.tensor([[0, -200, 5, 6]]), torch.tensor([[-100, -100, -100, 6]])).tolist()
        [[True, True, False, True]]
    """
    raw = input_ids <= 0
    if placeholder is not None:
        raw = raw | (input_ids == placeholder)
    return raw if labels is None else raw | (labels != IGNORED)


def fuse_frames(
    fusion: PreFusion, full: Tensor, compressed: Tensor, text: Tensor, raw: Tensor
) -> tuple[Tensor, Tensor]:
    """Fuse a video: each frame by itself with the same text.

    Args:
        fusion: the layers.
        full: ``[T, N, D]``.
        compressed: ``[T, C, D]``.
        text: ``[S, D]``.
        raw: bool ``[S]``.

    Returns:
        Compressed frames in the order of time ``[T * C, D]`` and the text averaged over frames ``[S, D]``.

    Example:
        >>> frames, text = fuse_frames(PreFusion([]), torch.zeros(2, 3, 4), torch.ones(2, 1, 4), torch.ones(5, 4),
        ...     torch.zeros(5, dtype=torch.bool))
        >>> frames.shape, text.shape
        (torch.Size([2, 4]), torch.Size([5, 4]))
    """
    count = full.shape[0]
    visual, fused = fusion(full, compressed, text.expand(count, -1, -1), raw.expand(count, -1))
    # The mean of many frames loses digits in half precision.
    return visual.flatten(0, 1), fused.float().mean(dim=0).to(fused.dtype)


def splice(visual: Tensor, text: Tensor, place: int) -> Tensor:
    """Put the compressed image in the place of its placeholder.

    Args:
        visual: ``[C, D]``.
        text: ``[S, D]`` fused text, the placeholder's row included.
        place: of the placeholder, 0 to S - 1.

    Returns:
        ``[C + S - 1, D]``.

    Raises:
        ValueError: if there is no such row.

    Example:
        >>> splice(torch.ones(2, 1), torch.zeros(3, 1), 1).flatten().tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    if not 0 <= place < text.shape[0]:
        raise ValueError(f"place={place} must be a row of the text, 0 to {text.shape[0] - 1}")
    return torch.cat([text[:place], visual, text[place + 1 :]])
