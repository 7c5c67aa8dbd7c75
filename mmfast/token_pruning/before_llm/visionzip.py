"""VisionZip: keep what the class token looks at, merge the rest into a few contextual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, VisionSignal, check_choice
from mmfast.token_pruning.similarity import highest_first, merged_keep, most_similar, sum_by_group
from mmfast.tokens import Keep, VisualTokens

Merging = Literal["add", "mean"]


@register("visionzip", stage="before_llm", paper="arXiv 2412.04467", source="dvlab-research/VisionZip", vectors=True)
@dataclass(frozen=True)
class VisionZip(Merger):
    """Keep the tokens of highest class attention and merge the others into contextual tokens.

    The contextual tokens are evenly spaced ones among the rest; each other token joins the one with the
    most similar key. The paper speaks of averaging; the code, and here ``merging="add"``, adds the mean of
    the joined tokens to the contextual token.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.

    Attributes:
        contextual: how many of ``keep`` are contextual tokens; int = count, float in [0, 1) = share of
            ``keep``, at least 1 where two tokens or more are kept. The paper's 10 of 64 by default.
        merging: ``"add"`` as the code, ``"mean"`` averages a contextual token with all that joined it.
        compat: ``"official"`` hands the embedding of the class token to the language model too, counts it
            in ``keep``, and appends the contextual tokens instead of leaving them at their place. It needs
            an encoder with a class token and images of one tile.
    """

    needs = frozenset({"cls_attention", "keys", "patch_features"})

    keep: int | float = 64
    scope: Literal["global", "per_tile"] = "per_tile"
    contextual: int | float = 10 / 64
    merging: Merging = "add"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merging", self.merging, ["add", "mean"])
        check_choice("compat", self.compat, [None, "official"])
        if self.compat == "official":
            object.__setattr__(self, "needs", self.needs | {"cls_features"})
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, int | float):
            raise TypeError(
                f"contextual={self.contextual!r} must be a count (int) or a share of keep (float in [0, 1))"
            )
        if self.contextual < 0 or (isinstance(self.contextual, float) and not self.contextual < 1):
            raise ValueError(
                f"contextual={self.contextual} must be at least 0 as a count (int), or lie in [0, 1) as a share of "
                "keep (float)"
            )

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features."""
        signals = {
            "cls_attention": VisionSignal("cls_attention"),
            "keys": VisionSignal("keys"),
            "patch_features": VisionSignal("patch_features"),
        }
        return signals if self.compat is None else {**signals, "cls_features": VisionSignal("cls_features")}

    def contextual_count(self, kept: int) -> int:
        """Say how many of ``kept`` tokens are contextual ones; at least one token is not.

        Example:
            >>> [VisionZip().contextual_count(kept) for kept in (64, 128, 2, 1)]
            [10, 20, 1, 0]
        """
        exact = isinstance(self.contextual, int)
        wanted = self.contextual if exact else max(round(self.contextual * kept), int(self.contextual > 0))
        return min(int(wanted), kept - 1)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose the dominant tokens and merge the others."""
        features, space = self.material(tokens)
        contextual = self.contextual_count(kept)
        official = self.compat == "official"
        head = self._class_token(tokens, features) if official else features[:0]
        dominant = highest_first(tokens.signals["cls_attention"], kept - contextual - len(head)).sort().values
        left = torch.ones(len(tokens), dtype=torch.bool, device=features.device)
        left[dominant] = False
        rest = left.nonzero().squeeze(-1)
        targets, merged, joined = merge_contextual(
            features[rest], tokens.signals["keys"][rest], contextual, self.merging
        )
        slots = torch.cat([dominant, rest[targets]])
        if official:
            # The class token has no place of its own: it takes the first one that nobody uses.
            left[slots] = False
            slots = torch.cat([left.nonzero()[0], slots])
        source = torch.full_like(left, -1, dtype=torch.int64)
        source[dominant] = torch.arange(len(head), kept - contextual, device=source.device)
        source[rest] = joined if contextual == 0 else joined + kept - contextual
        sizes = torch.bincount(joined.clamp_min(0), minlength=contextual)[:contextual].float()
        return merged_keep(
            slots,
            torch.cat([head, features[dominant], merged]),
            torch.cat([sizes.new_ones(kept - contextual), sizes]),
            source,
            space,
            raster=not official,
        )

    @staticmethod
    def _class_token(tokens: VisualTokens, features: Tensor) -> Tensor:
        """Return the class token's features, ``[1, C]``."""
        own = tokens.signals["cls_features"]
        if own.shape != (1, features.shape[1]):
            raise ValueError(
                f"compat='official' of visionzip needs one tile and a projector that works token by token, got class "
                f"features of shape {tuple(own.shape)} for features of shape {tuple(features.shape)}; use compat=None"
            )
        return own.to(features.dtype)


def merge_contextual(
    features: Tensor, keys: Tensor, contextual: int, merging: Merging = "add"
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens into evenly spaced ones of them, by similarity of keys.

    Args:
        features: ``[M, C]`` of the tokens that are not dominant, in raster order.
        keys: ``[M, d]``.
        contextual: number of merged tokens, at most M.
        merging: as of :class:`VisionZip`.

    Returns:
        int64 ``[contextual]`` places of the targets, their merged features ``[contextual, C]``, and for each
        token the target it joined (int64 ``[M]``; -1 if there are none).

    Example:
        >>> features = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
        >>> keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.0]])
        >>> targets, merged, joined = merge_contextual(features, keys, 2)
        >>> targets.tolist(), merged.tolist(), joined.tolist()
        ([0, 2], [[6.0], [4.0]], [0, 0, 1, 0])
    """
    total = features.shape[0]
    joined = torch.full((total,), -1, dtype=torch.int64, device=features.device)
    targets = torch.arange(contextual, device=features.device) * max(1, total // max(1, contextual))
    if contextual == 0:
        return targets, features[:0], joined
    others = torch.ones(total, dtype=torch.bool, device=features.device)
    others[targets] = False
    group = most_similar(keys[others], keys[targets])
    joined[others], joined[targets] = group, torch.arange(contextual, device=group.device)
    sums = sum_by_group(features[others], group, contextual)
    count = torch.bincount(group, minlength=contextual)[:, None]
    own = features[targets].float()
    merged = own + sums / count.clamp_min(1) if merging == "add" else (own + sums) / (1 + count)
    return targets, merged.to(features.dtype), joined
