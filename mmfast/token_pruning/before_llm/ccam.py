"""Video-CCAM: learned queries read a video, the later ones more of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmfast.registry import register
from mmfast.token_pruning.projector_base import (
    LearnedMerger,
    check_heads,
    check_positive,
    query_keep,
    sincos,
    sincos_grid,
    small_start,
)
from mmfast.tokens import Keep, VisualTokens


@register("ccam", stage="before_llm", paper="arXiv 2408.14023", training_free=False)
@dataclass(frozen=True)
class Ccam(LearnedMerger):
    """Let learned queries read all frames of a video at once, each those up to its own place in time.

    The first queries see the first frame alone, the last one sees everything, so that their order tells that of the
    video; images are seen whole. It takes the place of the projector. No training code was published: the module
    follows the paper's text. Without ``weights`` the queries are random (mechanics only).

    Weights: the state dict of :class:`CausalCrossAttention`; they fit one number of queries.

    Paper: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
    Videos" (arXiv 2408.14023).

    Attributes:
        keep: how many queries; int = count per image or video, float = fraction of its tokens. The paper has 1024.
        scope: ``"global"``, the default here, reads all frames together.
        heads: attention heads.
        weights: path of a safetensors file with the trained module; empty = untrained.
    """

    keep: int | float | None = 0.25
    scope: Literal["global", "per_tile"] = "global"
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(heads=self.heads)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Ask the queries."""
        read = tokens.signals.get("patch_features", tokens.features)
        sizes = (read.shape[-1], tokens.features.shape[-1], kept, self.heads)
        layout, place = tokens.layout, read.device
        # A token that belongs to no frame is seen by everybody.
        times = layout.frame.clamp_min(0).to(place)
        found = self.part(tokens, CausalCrossAttention, *sizes)(
            read.float()[None],
            times - times.min(),
            layout.row.clamp_min(0).to(place),
            layout.col.clamp_min(0).to(place),
        )[0]
        return query_keep(len(tokens), found.to(tokens.features.dtype))


class CausalCrossAttention(nn.Module):
    """Learned queries, one masked cross-attention, and a linear layer.

    Args:
        width: of the features, Dv.
        out: width of the embeddings, D; a multiple of 4 and of ``heads``.
        queries: number of queries.
        heads: attention heads.

    Example:
        >>> module = CausalCrossAttention(6, 8, queries=4, heads=2)
        >>> times, rows, cols = torch.tensor([0, 0, 1, 1]), torch.zeros(4), torch.tensor([0, 1, 0, 1])
        >>> module(torch.randn(1, 4, 6), times, rows, cols).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, width: int, out: int, queries: int = 1024, heads: int = 8) -> None:
        super().__init__()
        check_heads(heads, out)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, out), std=0.02))
        self.kv_proj = nn.Linear(width, out, bias=False)
        self.attn = nn.MultiheadAttention(out, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(out, eps=1e-6)
        self.ln_kv = nn.LayerNorm(out, eps=1e-6)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        self.proj = nn.Linear(out, out)
        small_start(self)

    def forward(self, features: Tensor, times: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Read a video.

        Args:
            features: ``[B, N, Dv]``, all frames.
            times: int64 ``[N]``, frame of each token, from 0.
            rows: ``[N]``, row of each token in its frame.
            cols: ``[N]``, column of each token in its frame.

        Returns:
            ``[B, queries, D]``.
        """
        value = self.ln_kv(self.kv_proj(features))
        width = value.shape[-1]
        key = value + sincos(times, width) + sincos_grid(rows, cols, width)
        query = self.ln_q(self.query).expand(features.shape[0], -1, -1)
        mask = causal_frames(self.query.shape[0], int(times.max()) + 1, features.device)[:, times]
        found: Tensor = self.proj(self.ln_post(self.attn(query, key, value, attn_mask=~mask, need_weights=False)[0]))
        return found


def causal_frames(queries: int, frames: int, device: torch.device | None = None) -> Tensor:
    """Say which frames each query sees: query i sees frame t where ``t <= floor(i * frames / queries)``.

    With fewer queries than frames that would hide the last frames from all; there a query sees every frame before
    the place of the next one.

    Args:
        queries: number of queries.
        frames: number of frames.
        device: where the mask is needed.

    Returns:
        bool ``[queries, frames]``, True = seen.

    Example:
        >>> causal_frames(4, 2).int().tolist()
        [[1, 0], [1, 0], [1, 1], [1, 1]]
    """
    query = torch.arange(queries, device=device)
    last = torch.maximum(query * frames // queries, (query + 1) * frames // queries - 1)
    return torch.arange(frames, device=device) <= last[:, None]
