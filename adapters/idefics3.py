"""Idefics3 and SmolVLM: square tiles between row and column tags, which are text."""

from __future__ import annotations

from mmfast.adapters.base import Adapter, family


@family("idefics3", "smolvlm")
class Idefics3(Adapter):
    """Each tile is one item; tags such as ``<row_1_col_1>`` are text and stay."""
