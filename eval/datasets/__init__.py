"""Data sets: what a model is asked, and what would be right."""

from __future__ import annotations

from mmfast.eval.datasets.shapes import Record, Shapes, render_clip, score

__all__ = ["Record", "Shapes", "render_clip", "score"]
