"""A CLIP model beside a vision-language model: how well patches fit the words of a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ClipTower:
    """Embed questions and patches in the space of a CLIP model.

    For methods that compare them there (``relevance="clip"``). The patches come from the vision encoder of the
    vision-language model, so that must be the one of this very CLIP model, or fine-tuned from it.

    Args:
        parts: what :func:`mmfast.adapters.load_clip` returns.
        tokenizer: tokenizer (or processor) of the vision-language model, which turns its tokens back into words.

    Example:
        >>> import mmfast
        >>> model, processor = mmfast.load_default()  # doctest: +SKIP
        >>> tower = mmfast.ClipTower.load("openai/clip-vit-large-patch14-336", tokenizer=processor)  # doctest: +SKIP
        >>> mmfast.accelerate(model, "cdpruner(keep=64, relevance='clip')", clip=tower)  # doctest: +SKIP
    """

    def __init__(self, parts: Any, tokenizer: Any) -> None:
        self.parts = parts
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
