"""VoCo-LLaMA: an image is read into a few tokens, and only these are seen afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import check_choice
from mmfast.token_pruning.compression_base import Compressor, Hidden, runs


@register(
    "voco", stage="in_llm", paper="arXiv 2406.12275", source="Yxxxb/VoCo-LLaMA", vectors=True, training_free=False
)
@dataclass(frozen=True)
class VoCo(Compressor):
    """Hide each image from everything after the compression tokens behind it.

    One entry of the vocabulary, ``<voco>``, stands several times behind each image; the copies differ by their
    positions alone (a model may instead have an entry for each). They see the image and all that is before it. Later
    tokens see them in its stead, so that after the prompt the caches hold a few entries per image. Positions are not
    renumbered. The model has to be trained with this mask (see ``recipes/voco.toml``), and has to know the token:
    ``mmfast.adapters.add_compression_tokens``.
    Images without such tokens behind them stay visible.

    Paper: "VoCo-LLaMA: Towards Vision Compression with Large Language Models", CVPR 2025.

    Attributes:
        tokens: how many compression tokens each image must have; None = as many as the prompt has.
        hide_prefix: what is hidden beside an image. ``"all"`` (the official code): also the text before the first
            image, and what stands between a later one and its compression tokens. ``"visual"`` (the paper): nothing.
            None takes what the model was trained with, as its configuration says.
    """

    tokens: int | None = None
    hide_prefix: Literal["all", "visual"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and (isinstance(self.tokens, bool) or self.tokens < 1):
            raise ValueError(f"tokens={self.tokens!r} must be an int of at least 1, or None")
        check_choice("hide_prefix", self.hide_prefix, [None, "all", "visual"])

    def hidden(self, media: Sequence[Tensor], text: Tensor, marked: Tensor) -> list[Hidden]:
        """Hide what each run of compression tokens has read.

        Raises:
            ValueError: if an image has not ``tokens`` of them, which happens where a prompt was cut off.
        """
        own = [places for places in media if places.numel()]
        every = torch.cat([*own, text]).sort().values
        plain = every[~torch.isin(every, marked)]
        found: list[Hidden] = []
        before = 0
        for run in runs(marked):
            first, behind = int(run[0]), int(run[-1]) + 1
            read = [places for places in own if before <= int(places.min()) and int(places.max()) < first]
            if not read:
                continue
            self._check(run.numel())
            places = torch.cat(read)
            if self.hide_prefix != "visual":
                begin = int(places.min()) if found else 0
                places = plain[(plain >= begin) & (plain < first)]
            found.append(Hidden(behind, places))
            before = behind
        if any(int(places.min()) >= before for places in own):
            self._check(0)
        return found

    def _check(self, count: int) -> None:
        if self.tokens is not None and count != self.tokens:
            raise ValueError(
                f"tokens={self.tokens}, but an image of the prompt has {count} compression tokens; write the prompt "
                "with mmfast.adapters.prepare, do not cut it off, or leave tokens out of the plan"
            )
