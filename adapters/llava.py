"""LLaVA 1.5 and VipLLaVA: one square grid per image, no special tokens inside it."""

from __future__ import annotations

from mmfast.adapters.base import Adapter, family


@family("llava", "vipllava")
class Llava(Adapter):
    """The plain case: everything is as the base class expects."""
