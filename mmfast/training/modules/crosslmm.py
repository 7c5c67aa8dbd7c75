"""CrossLMM: few pooled tokens in the prompt, which look at all tokens again between the layers.

No code was published; what the paper leaves open is decided here and named where it is.

Paper: "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms" (arXiv 2505.17020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def pool_frames(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Average the tokens of each frame to ``side`` x ``side``; the paper has 1, 9 and 16 tokens.

    Args:
        features: ``[T, h * w, D]`` in raster order.
        grid: h and w.
        side: of the pooled grid, at most h and w.

    Returns:
        ``[T, side * side, D]``.

    Raises:
        ValueError: if the side is not in range.

    Example:
        >>> pool_frames(torch.arange(4.0).reshape(1, 4, 1), (2, 2), 1).item()
        1.5
    """
    if not 1 <= side <= min(grid):
        raise ValueError(f"side={side} must lie in 1..{min(grid)}, the smaller side of the grid")
    maps = rearrange(features, "t (h w) d -> t d h w", h=grid[0])
    return rearrange(functional.adaptive_avg_pool2d(maps, side), "t d h w -> t (h w) d")


class GatedCrossAttention(nn.Module):
    """Tokens look at a context; a gate that starts at 0 says how much of it they take up.

    With the gate at 0 the module changes nothing: a trained language model begins as it was.

    Args:
        width: of the tokens, D.
        context: width of the context.
        heads: attention heads.

    Example:
        >>> module = GatedCrossAttention(8, 6, heads=2)
        >>> tokens = torch.randn(1, 3, 8)
        >>> torch.equal(module(tokens, torch.randn(1, 5, 6)), tokens)
        True
    """

    def __init__(self, width: int, context: int, heads: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(context)
        self.attn = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, context: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return ``tokens + gamma * attention``.

        Args:
            tokens: ``[B, n, D]``.
            context: ``[B, N, C]``.
            hidden: bool ``[B, N]``, True where the context is padding; None = nowhere.
        """
        keys = self.ln_kv(context)
        read = self.attn(self.ln_q(tokens), keys, keys, key_padding_mask=hidden, need_weights=False)[0]
        found: Tensor = tokens + self.gamma * read
        return found


class DualCrossAttention(nn.Module):
    """What stands before a layer: visual tokens look at the encoder's tokens, and text does, each by its own module.

    Args:
        width: of the language model, D.
        context: width of the encoder's features.
        heads: attention heads.
        visual: whether pooled visual tokens look too.

    Example:
        >>> block = DualCrossAttention(8, 6, heads=2)
        >>> places = torch.tensor([[True, False, False]])
        >>> block(torch.randn(1, 3, 8), torch.randn(1, 5, 6), places).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, context: int, heads: int = 8, *, visual: bool = True) -> None:
        super().__init__()
        self.visual_to_visual = GatedCrossAttention(width, context, heads) if visual else None
        self.text_to_visual = GatedCrossAttention(width, context, heads)

    def forward(self, states: Tensor, context: Tensor, places: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Let the tokens look.

        Args:
            states: ``[B, S, D]`` of all tokens.
            context: ``[B, N, C]`` features of the encoder.
            places: bool ``[B, S]``, True for visual tokens.
            hidden: bool ``[B, N]``, True where the context is padding.

        Returns:
            ``[B, S, D]``.
        """
        text: Tensor = self.text_to_visual(states, context, hidden)
        visual = states if self.visual_to_visual is None else self.visual_to_visual(states, context, hidden)
        return torch.where(places[..., None], visual, text)


@contextmanager
def crossed(
    layers: Sequence[nn.Module], blocks: Sequence[DualCrossAttention], every: int, context: Tensor, places: Tensor
) -> Iterator[None]:
    """Put blocks before every ``every``-th decoder layer for as long as the context lasts.

    Which layers that are is not in the paper: here layer 0, ``every``, twice ``every`` and so on. Tokens that are
    generated look as text.

    Args:
        layers: the decoder layers, which take the hidden states first.
        blocks: one for each of those layers.
        every: distance in layers.
        context: ``[B, N, C]`` features of the encoder.
        places: bool ``[B, S]``, True for visual tokens of the prompt.

    Raises:
        ValueError: if there are not as many blocks as layers they belong to.

    Example:
        >>> layers, blocks = [nn.Identity(), nn.Identity()], [DualCrossAttention(8, 6, heads=2)]
        >>> states = torch.randn(1, 3, 8)
        >>> with crossed(layers, blocks, 2, torch.randn(1, 5, 6), torch.tensor([[True, False, False]])):
        ...     torch.equal(layers[0](states), states)
        True
    """
    chosen = layers[:: max(every, 1)]
    if every < 1 or len(blocks) != len(chosen):
        raise ValueError(f"every={every}: {len(layers)} layers need {len(chosen)} blocks, got {len(blocks)}")
    handles = []
    try:
        for layer, block in zip(chosen, blocks, strict=True):
            handles.append(layer.register_forward_pre_hook(_looking(block, context, places), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _looking(block: DualCrossAttention, context: Tensor, places: Tensor) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs["hidden_states"] if named else args[0]
        own = places.to(hidden.device)
        if hidden.shape[1] != own.shape[1]:
            own = own.new_zeros(hidden.shape[:2])
        hidden = block(hidden, context.to(hidden.device, hidden.dtype), own)
        return (args, {**kwargs, "hidden_states": hidden}) if named else ((hidden, *args[1:]), kwargs)

    return look
