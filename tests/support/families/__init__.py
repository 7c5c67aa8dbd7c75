"""Every family the adapters serve, by ``model_type``."""

from __future__ import annotations

from support.families.anyres import LlavaNext, LlavaNextVideo, LlavaOnevision
from support.families.base import Batch, Family, cast
from support.families.gemma import Gemma3, PaliGemma
from support.families.llava import Llava, VideoLlava, VipLlava
from support.families.mistral3 import Mistral3
from support.families.qwen import Qwen2VL, Qwen3VL, Qwen25VL
from support.families.tiles import Idefics3, InternVL, SmolVLM

FAMILIES: dict[str, Family] = {
    kind.name: kind()
    for kind in (
        Llava,
        VipLlava,
        LlavaNext,
        LlavaNextVideo,
        LlavaOnevision,
        VideoLlava,
        Qwen2VL,
        Qwen25VL,
        Qwen3VL,
        InternVL,
        Idefics3,
        SmolVLM,
        PaliGemma,
        Gemma3,
        Mistral3,
    )
}

__all__ = ["FAMILIES", "Batch", "Family", "cast"]
