"""CoreMatching: keep the tokens that excite the same neurons as the prompt as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import check_choice, top_indices
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerTokens
from mmfast.token_pruning.similarity import row_blocks


@register(
    "corematching", stage="in_llm", paper="arXiv 2505.19235", source="wangqinsi1/2025-ICML-CoreMatching", vectors=True
)
@dataclass(frozen=True)
class CoreMatching(DropOnce):
    """Drop once, by how many neurons of the feed-forward part a token shares with the core of the prompt.

    With ``keep=None`` those tokens stay whose number of shared neurons lies above the elbow of the sorted curve.
    What the paper does to the neurons themselves while decoding is not done here.

    The rules differ in what counts as active and as core. The released code takes every positive activation, and
    as core those of one token, counted from the end of the prompt: with the template of LLaVA-1.5 the last one of
    the question. The paper takes the strongest ``active`` share of a token's positive activations, and as core the
    ``core`` share of neurons that are active in most tokens of the prompt. ``rule="sign"``, that of the code, is the
    default: most tokens of a prompt are visual, so the core of the paper describes the picture rather than the
    question, and on the embedded model it loses clearly more.

    Paper: "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
    Comprehensive Acceleration of Vision-Language Models", ICML 2025.

    Attributes:
        rule: ``"sign"``, the rule of the released code, or ``"paper"``.
        query_offset: token that forms the core (``"sign"``); -1 = the last token of the prompt.
        active: share of a token's positive activations that count (``"paper"``).
        core: share of the neurons that form the core (``"paper"``).
    """

    needs = frozenset({"activations"})
    adaptive = True

    keep: int | float | None = None
    layer: int | float = 3
    rule: Literal["sign", "paper"] = "sign"
    query_offset: int = -5
    active: float = 0.2
    core: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rule", self.rule, ["sign", "paper"])
        for field in ("active", "core"):
            if not 0.0 < getattr(self, field) <= 1.0:
                raise ValueError(f"{field}={getattr(self, field)} must lie in (0, 1]")
        if self.query_offset >= 0:
            raise ValueError(f"query_offset={self.query_offset} counts from the end and must be below 0; -1 is last")

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Keep the tokens of most matches, or those above the elbow."""
        matches = self.matches(tokens)
        if kept is not None:
            return top_indices(matches, kept)
        above = above_elbow(matches)
        # A straight curve has no elbow, and so nothing that could be told apart.
        return above if above.numel() else torch.arange(matches.numel(), device=matches.device)

    def matches(self, tokens: LayerTokens) -> Tensor:
        """Count the neurons that each candidate shares with the core, float32 ``[V]``.

        Raises:
            ValueError: if the activations are missing.
        """
        if tokens.activations is None:
            raise ValueError(f"method {self.name!r} needs the activations of the layer before")
        if self.rule == "sign":
            active = tokens.activations > 0
            core = active[max(0, tokens.last_token + 1 + self.query_offset)]
        else:
            active = strongest(tokens.activations, self.active)
            core = most_frequent(active, self.core)
        return (active[tokens.candidates] & core).sum(dim=1).float()


def strongest(activations: Tensor, share: float) -> Tensor:
    """Mark in each row the largest ``share`` of its positive entries; ties go to the lower index.

    Args:
        activations: ``[n, M]``.
        share: in (0, 1]; the number of entries is rounded up.

    Returns:
        bool ``[n, M]``.

    Example:
        >>> strongest(torch.tensor([[3.0, -1.0, 1.0, 2.0]]), 0.5).tolist()
        [[True, False, False, True]]
    """
    marked = torch.zeros_like(activations, dtype=torch.bool)
    for part in row_blocks(*activations.shape):
        rows = activations[part].float()
        wanted = ((rows > 0).sum(dim=1, keepdim=True) * share).ceil()
        order = rows.sort(dim=1, descending=True, stable=True).indices
        within = torch.arange(rows.shape[1], device=rows.device) < wanted
        marked[part] = torch.zeros_like(within).scatter_(1, order, within)
    return marked


def most_frequent(active: Tensor, share: float) -> Tensor:
    """Mark the ``share`` of columns that are true in most rows; ties go to the lower index.

    Args:
        active: bool ``[n, M]``.
        share: in (0, 1]; at least one column is marked.

    Returns:
        bool ``[M]``.

    Example:
        >>> most_frequent(torch.tensor([[True, False, True], [True, False, False]]), 0.34).tolist()
        [True, False, False]
    """
    wanted = max(1, round(share * active.shape[1]))
    core = torch.zeros_like(active[0])
    core[top_indices(active.sum(dim=0), wanted)] = True
    return core


def elbow(values: Tensor) -> int:
    """Return the place on a falling curve that is farthest from the straight line between its ends.

    Args:
        values: ``[N]`` descending.

    Example:
        >>> elbow(torch.tensor([9.0, 8.0, 1.0, 0.0]))
        1
    """
    heights = values.double()
    places = torch.arange(heights.numel(), dtype=torch.float64, device=values.device)
    # The distance to the line is this area over the length of the line, which is the same for all.
    area = (heights - heights[0]) * places[-1] - places * (heights[-1] - heights[0])
    return int(area.abs().argmax())


def above_elbow(values: Tensor) -> Tensor:
    """Return the indices of the values above the elbow of their sorted curve, ascending; none if it is straight.

    Args:
        values: ``[N]`` in any order.

    Example:
        >>> above_elbow(torch.tensor([1.0, 9.0, 0.0, 8.0])).tolist()
        [1]
    """
    ordered = values.sort(descending=True).values
    return (values > ordered[elbow(ordered)]).nonzero().squeeze(-1)
