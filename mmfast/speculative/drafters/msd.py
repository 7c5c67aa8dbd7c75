"""MSD: EAGLE's layer, with text and images entering it apart."""

from __future__ import annotations

from dataclasses import dataclass

from mmfast.registry import register
from mmfast.speculative.heads.feature import TreeDrafter


@register("msd", stage="decode", paper="arXiv 2505.14260", source="Lyn-Lucy/MSD", training_free=False)
@dataclass(frozen=True)
class MSD(TreeDrafter):
    """Draft with one decoder layer that continues hidden states; images enter it as they entered the model.

    A slot of text reads ``fc([embedding of the next token; hidden state])``, a slot whose next token is visual the
    projected visual embedding alone, for any number of images. Trees grow as in EAGLE-2.

    Weights: ``fc.weight`` ``[D, 2 D]``, ``fc.bias``, ``layers.0.self_attn.{q,k,v,o}_proj.weight``,
    ``layers.0.mlp.{gate,up,down}_proj.weight``, ``layers.0.post_attention_layernorm.weight``, and the biases of a
    Qwen layer where it has them; copies of the model's embeddings and output layer are not read. Files of EAGLE-1 and
    EAGLE-2 fit. ``config.json`` is that of a Llama layer, with ``rope_parameters`` or ``rope_scaling`` holding
    ``mrope_section`` where positions have three rows.

    Paper: "Speculative Decoding Reimagined for Multimodal Large Language Models".

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: runs of the layer beyond the root's; the tree is at most one level deeper.
        top_k: children of a node, and nodes looked beyond on a level, at most.
    """
