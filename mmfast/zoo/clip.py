"""A CLIP model beside a vision-language model: how well patches fit the words of a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_AT_ONCE = 32
"""Frames embedded in one run of the CLIP model."""


class ClipTower:
    """Embed questions and patches in the space of a CLIP model.

    For methods that compare them there (``relevance="clip"``). The patches come from the vision encoder of the
    vision-language model, so that must be the one of this very CLIP model, or fine-tuned from it. Methods that choose
    frames show them to the CLIP model itself, which can be any.

    Args:
        parts: what :func:`mmfast.adapters.load_clip` returns.
        tokenizer: tokenizer (or processor) of the vision-language model, which turns its tokens back into words; to
            choose frames it must be the processor, which knows how pixels were normalised.

    Example:
        >>> import mmfast
        >>> model, processor = mmfast.load_default()  # doctest: +SKIP
        >>> tower = mmfast.ClipTower.load("openai/clip-vit-large-patch14-336", tokenizer=processor)  # doctest: +SKIP
        >>> mmfast.accelerate(model, "cdpruner(keep=64, relevance='clip')", clip=tower)  # doctest: +SKIP
    """

    def __init__(self, parts: Any, tokenizer: Any) -> None:
        self.parts = parts
        self._pixels = _normalisation(tokenizer)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not callable(getattr(self.tokenizer, "decode", None)):
            raise TypeError(
                f"tokenizer must be the tokenizer or the processor of the vision-language model, got "
                f"{type(tokenizer).__name__}"
            )

    @staticmethod
    def load(
        source: str | Path,
        *,
        tokenizer: Any,
        weights: str | Path | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
    ) -> ClipTower:
        """Load a CLIP model, from safetensors files alone.

        Args:
            source: a CLIP model on the hub, a folder that ``save_pretrained`` wrote, or ``"open_clip:NAME"`` for an
                architecture of open_clip.
            tokenizer: tokenizer or processor of the vision-language model.
            weights: for open_clip, the ``.safetensors`` file.
            device: where to put the model; None leaves it on the CPU.
            local_files_only: take what the hub cache holds and do not use the network.

        Raises:
            ValueError: if the source is no CLIP model or has no safetensors weights.
            OSError: if files of a hub model cannot be fetched.
            ImportError: if open_clip is asked for and not installed.
        """
        # The one door to the models; it imports transformers.
        from mmfast.adapters import load_clip

        parts = load_clip(source, weights=weights, device=device, local_files_only=local_files_only)
        return ClipTower(parts, tokenizer)

    @property
    def width(self) -> int:
        """Channels of the patch features this model projects."""
        return int(self.parts.width)

    @property
    def knows_pixels(self) -> bool:
        """Whether a processor said how pixels were normalised, so that :meth:`frame_embeds` can undo it."""
        return self._pixels is not None

    @torch.no_grad()
    def frame_embeds(self, pixels: Tensor) -> Tensor:
        """Embed the frames of a video with the CLIP model's own vision encoder.

        Args:
            pixels: ``[T, 3, H, W]`` normalised as the vision-language model reads them.

        Returns:
            float32 ``[T, E]``.

        Raises:
            ValueError: if it is not known how pixels were normalised.
        """
        if self._pixels is None:
            raise ValueError("pass the processor of the vision-language model as tokenizer= to embed frames")
        mean, deviation = (torch.tensor(values, device=pixels.device)[:, None, None] for values in self._pixels)
        # A few at a time: full pictures of a long video take more room than all that is made of them.
        rows = [
            self.parts.see(cropped((part.float() * deviation + mean).clamp(0, 1), self.parts.side))
            for part in pixels.split(_AT_ONCE)
        ]
        return torch.cat(rows).float().to(pixels.device)

    @torch.no_grad()
    def text_embeds(self, input_ids: Tensor) -> Tensor:
        """Embed a question.

        Args:
            input_ids: int64 ``[n]`` tokens of the vision-language model; special tokens are skipped.

        Returns:
            float32 ``[M, E]``, one row for each segment that fits the text encoder.
        """
        text = self.tokenizer.decode(input_ids.tolist(), skip_special_tokens=True).strip()
        words = self.parts.words(text)
        rows = [self.parts.encode(segment) for segment in segments(words, self.parts.segment)]
        return torch.cat(rows).float().to(input_ids.device)

    @torch.no_grad()
    def image_embeds(self, patch_features: Tensor) -> Tensor:
        """Project the patches as the class token is projected.

        Args:
            patch_features: ``[N, C]`` what the vision encoder gave.

        Returns:
            float32 ``[N, E]``.

        Raises:
            ValueError: if C is not the width of the CLIP model.
        """
        if patch_features.ndim != 2 or patch_features.shape[1] != self.width:
            raise ValueError(
                f"patch_features must be [N, {self.width}] for this CLIP model, got {list(patch_features.shape)}; load "
                "the CLIP model that the vision encoder was taken from"
            )
        embeds: Tensor = self.parts.project(patch_features.float())
        return embeds.float().to(patch_features.device)


def cropped(pictures: Tensor, side: int) -> Tensor:
    """Resize pictures to a shorter side and cut out the square in the middle, as CLIP models are trained.

    Args:
        pictures: float ``[T, 3, H, W]``.
        side: pixels per side of the square.

    Example:
        >>> cropped(torch.zeros(2, 3, 8, 16), 4).shape
        torch.Size([2, 3, 4, 4])
    """
    height, width = pictures.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    resized = interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[..., top : top + side, left : left + side]


def _normalisation(processor: Any) -> tuple[list[float], list[float]] | None:
    """Read mean and deviation that a processor normalises pixels to; None if it is a tokenizer alone."""
    for name in ("video_processor", "image_processor"):
        part = getattr(processor, name, None)
        mean, deviation = getattr(part, "image_mean", None), getattr(part, "image_std", None)
        if mean is not None and deviation is not None:
            return [float(value) for value in mean], [float(value) for value in deviation]
    return None


def segments(words: list[int], length: int) -> list[list[int]]:
    """Cut tokens into segments; no words give one empty segment.

    Args:
        words: the tokens.
        length: most tokens of a segment.

    Example:
        >>> segments([1, 2, 3, 4, 5], 2), segments([], 2)
        ([[1, 2], [3, 4], [5]], [[]])
    """
    return [words[start : start + length] for start in range(0, max(1, len(words)), length)]
