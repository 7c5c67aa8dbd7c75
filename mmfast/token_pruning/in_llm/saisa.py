"""SAISA: visual tokens are looked at but never look, and pass no layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfast.registry import register
from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.layers import LayerBypass, LayerTokens, Route
from mmfast.token_pruning.weights import check_path, prepared


@register("saisa", stage="in_llm", paper="arXiv 2502.02458", source="icip-cas/SAISA", vectors=True, training_free=False)
@dataclass(frozen=True)
class Saisa(LayerBypass):
    """Show every layer the visual tokens as keys and values of projected features, and compute nothing else of them.

    Visual tokens are never queries and pass no output projection and no feed-forward part; they keep
    their positions. With ``weights`` layer l sees the features of the vision encoder through a projector
    of its own. Without, every layer sees the embeddings with which the visual tokens entered, which no
    model was trained for (mechanics only). Nothing is removed, so there is no ``keep``.

    Weights, for each layer l, vision width C and hidden size D: ``layers.<l>.0.weight`` ``[D, C]``,
    ``layers.<l>.0.bias`` ``[D]``, ``layers.<l>.2.weight`` ``[D, D]``, ``layers.<l>.2.bias`` ``[D]``.

    Paper: "SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency".

    Attributes:
        weights: path of a safetensors file with the trained projectors; empty = entering embeddings.
    """

    bypass = "freeze"
    needs = frozenset({"embeds"})

    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path(self.weights)

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the encoder's features where there are projectors for them."""
        return {"patch_features": VisionSignal("patch_features")} if self.weights else {}

    def layers_of(self, depth: int) -> list[int]:
        """Return all layers."""
        return list(range(depth))

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int]:
        """Count the text: visual tokens are shown, but take no part."""
        return [text] * depth

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Let no visual token take part, and say what the layer sees of them."""
        nobody = tokens.candidates.new_empty(0)
        if not self.weights:
            if tokens.embeds is None:
                raise ValueError("the embeddings of the prompt are missing; name 'embeds' in needs")
            return Route(nobody, states=tokens.embeds[tokens.candidates])
        if "patch_features" not in tokens.signals:
            raise ValueError(
                f"saisa with weights={self.weights!r} needs patch_features of the vision encoder, which were not "
                "delivered; pass pixel values instead of precomputed features"
            )
        features = tokens.signals["patch_features"]
        width, dtype = tokens.hidden.shape[1], tokens.hidden.dtype
        projectors = prepared(self, SaisaProjectors, (features.shape[1], width, depth), features.device, dtype)
        return Route(nobody, states=projectors(features, layer))


class SaisaProjectors(nn.Module):
    """A projector for each layer, from features of the vision encoder to hidden states.

    Args:
        vision: width C of the features.
        width: hidden size D.
        depth: number of layers.

    Example:
        >>> SaisaProjectors(6, 8, 2)(torch.randn(5, 6), 1).shape
        torch.Size([5, 8])
    """

    def __init__(self, vision: int, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """Turn features ``[N, C]`` into what layer ``layer`` sees, ``[N, D]``."""
        projector = self.layers[layer]
        states: Tensor = projector(features.to(next(projector.parameters()).dtype))
        return states


def naavit_mask(visual: Tensor) -> Tensor:
    """Return who may look at whom when visual tokens never look.

    Args:
        visual: ``[n]`` bool, True for visual tokens, N of them.

    Returns:
        bool ``[n - N, n]``, True = visible; one row per other token, in order.

    Example:
        >>> naavit_mask(torch.tensor([False, True, False])).int().tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    places = torch.arange(visual.numel(), device=visual.device)
    return places <= places[~visual][:, None]
