"""Rendered scenes of coloured shapes and short text, the world that the embedded model knows.

Every picture, question, answer and owner map follows from a seed, so that accuracy can be measured
without a download and an oracle can know which patches matter.
"""

from __future__ import annotations

from mmfast.eval.datasets.shapes.dataset import SPLITS, Record, Shapes
from mmfast.eval.datasets.shapes.questions import (
    CORE_FAMILIES,
    EXTRA_FAMILIES,
    FAMILIES,
    Question,
    ask,
    score,
)
from mmfast.eval.datasets.shapes.render import Rendered, render
from mmfast.eval.datasets.shapes.scene import COLORS, SHAPES, WORLD_VERSION, Item, Scene, sample_scene
from mmfast.eval.datasets.shapes.video import CLIP_FAMILIES, MOTION_FAMILIES, Clip, render_clip

__all__ = [
    "CLIP_FAMILIES",
    "COLORS",
    "CORE_FAMILIES",
    "EXTRA_FAMILIES",
    "FAMILIES",
    "MOTION_FAMILIES",
    "SHAPES",
    "SPLITS",
    "WORLD_VERSION",
    "Clip",
    "Item",
    "Question",
    "Record",
    "Rendered",
    "Scene",
    "Shapes",
    "ask",
    "render",
    "render_clip",
    "sample_scene",
    "score",
]
