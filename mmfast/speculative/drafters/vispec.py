"""ViSpec: EAGLE's layer, with each image compressed to a token and a global vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.registry import register
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead, TreeDrafter


@register("vispec", stage="decode", paper="arXiv 2509.15235", source="KangJialiang/ViSpec", training_free=False)
@dataclass(frozen=True)
class ViSpec(TreeDrafter):
    """Draft with one decoder layer that sees every image as a few tokens and one vector.

    Learned queries read the projected embeddings of an image. All but the last answer stand for the image, at its last
    positions; the last enters every slot of text after it, until the next image. The cost of drafting does not depend
    on resolution. Ours: a video is compressed frame by frame where its frames can be told apart, and later text
    reads the mean of their vectors.

    Weights: those of ``msd``, ``img_fc.weight`` ``[D, 2 D]``, ``img_fc.bias``, ``imadpt.q`` ``[num_q, H, d]``,
    ``imadpt.{k,v}_proj.weight`` ``[H d, D]`` and ``imadpt.o_proj.weight`` ``[D, H d]``.

    Paper: "ViSpec: Accelerating Vision-Language Models with Vision-Aware Speculative Decoding".

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: runs of the layer beyond the root's; the tree is at most one level deeper.
        top_k: children of a node, and nodes looked beyond on a level, at most.
    """

    module: ClassVar[type[FeatureHead]] = CompressedHead

    total_tokens: int = 30
    depth: int = 3
    top_k: int = 8
