"""LLaVA-Scissor: one token for everything that hangs together, first in each frame, then over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, check_choice
from mmfast.token_pruning.before_llm.prunevid import check_threshold
from mmfast.token_pruning.similarity import (
    MATRIX_LIMIT,
    chain_heads,
    frame_places,
    highest_first,
    merged_keep,
    most_similar,
    normalised,
    row_blocks,
    segment_sums,
)
from mmfast.tokens import Keep, VisualTokens

PIECE = 256
"""So many tokens of a frame are compared with each other, where there are too many for comparing all."""


@register("llava_scissor", stage="before_llm", paper="arXiv 2506.21862", source="HumanMLLM/LLaVA-Scissor", vectors=True)
@dataclass(frozen=True)
class LLaVAScissor(Merger):
    """Replace what hangs together by similarity with one token, per frame and then over all frames.

    Tokens more similar than ``threshold``, directly or through others, form a component. Components of each frame
    are averaged, and then components of these averages over all frames. Every token finally joins the most similar
    of the results. Each stands at the place of its best connected token.

    With ``keep=None`` the threshold decides how many are left. With a ``keep`` the strongest links are taken until
    exactly as many components are left: links between the components of the frames, or, where these are already too
    few, only the stronger ones inside frames. Components are exact, where the official code samples them; but with a
    ``keep`` and more than 4096 components in the frames, only those of the same and of consecutive frames are linked.

    A single image is one frame.

    Paper: "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs", 2025.

    Attributes:
        threshold: similarity above which tokens are linked, in [-1, 1].
        compat: ``"official"`` hands over the components in the order of the code, and lets those to which no token
            is most similar have none.
    """

    adaptive = True

    keep: int | float | None = None
    threshold: float = 0.9
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        check_threshold("threshold", self.threshold)

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the components over all frames."""
        return self.component_counts(tokens)[1]

    def component_counts(self, tokens: VisualTokens) -> tuple[int, int]:
        """Count the components inside the frames, and those over all frames, that the threshold leaves.

        Example:
            >>> LLaVAScissor().component_counts(VisualTokens.from_features(torch.eye(3)))
            (3, 3)
        """
        _, within, _ = self._within_frames(tokens)
        return within.shape[0], linked(within, self.threshold)[1].numel()

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Find the components, and let every token join one."""
        if self.keep is None:
            _, within, heads = self._within_frames(tokens)
            group, over = linked(within, self.threshold)
            heads = heads[over]
        else:
            within, heads, group = self._exactly(tokens, kept)
        found = _means(within, group, heads.numel())
        source = most_similar(tokens.features, found)
        if self.compat is None:
            source[heads] = torch.arange(heads.numel(), device=source.device)
        joined = torch.bincount(source, minlength=heads.numel())
        total = segment_sums(tokens.features, source, heads.numel()) + found
        features = (total / (joined + 1)[:, None]).to(tokens.features.dtype)
        return merged_keep(heads, features, joined.clamp_min(1).float(), source, raster=self.compat is None)

    def _within_frames(self, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Find the components of each frame: the one of each token, their means, and the token each stands at."""
        features = tokens.features
        group = torch.empty(len(tokens), dtype=torch.int64, device=features.device)
        heads, before = [], 0
        for places in frame_places(tokens.layout):
            places = places.to(features.device)
            own, over = linked(features[places], self.threshold)
            group[places] = own + before
            heads.append(places[over])
            before += over.numel()
        return group, _means(features, group, before), torch.cat(heads)

    def _exactly(self, tokens: VisualTokens, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Find ``kept`` components: the means of those within frames, the tokens, and the component of each mean."""
        _, within, heads = self._within_frames(tokens)
        device, across = heads.device, heads.numel() >= kept
        if not across:
            within, heads = tokens.features, torch.arange(len(tokens), device=device)
        frame = torch.empty(len(tokens), dtype=torch.int64, device=device)
        for index, places in enumerate(frame_places(tokens.layout)):
            frame[places.to(device)] = index
        order = frame[heads].sort(stable=True).indices
        frames = list(order.split(torch.bincount(frame[heads]).tolist()))
        everything = across and heads.numel() <= MATRIX_LIMIT
        pieces = [[order]] if everything else [list(part.split(PIECE)) for part in frames]
        links = spanning_links(*candidate_links(within, pieces, across=across), heads.numel())
        group, first = grouped(heads.numel(), links[:, : heads.numel() - kept])
        return within, heads[first], group


def _means(features: Tensor, group: Tensor, groups: int) -> Tensor:
    return segment_sums(features, group, groups) / torch.bincount(group, minlength=groups)[:, None]


def linked(features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Find the connected components of the graph that links tokens more similar than ``threshold``.

    No matrix of all similarities is held: rows are dealt with in blocks.

    Args:
        features: ``[n, D]``.
        threshold: cosine similarity above which two tokens are linked.

    Returns:
        int64 ``[n]`` component of each token, and int64 ``[C]``, ascending, the token with most links in each
        component, the first one where several have as many.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6], [0.95, 0.3]])
        >>> [part.tolist() for part in linked(features, 0.88)]
        [[1, 0, 1, 1], [1, 3]]
    """
    unit = normalised(features)
    total, device = unit.shape[0], unit.device
    label = torch.arange(total, device=device)
    degree = torch.zeros(total, dtype=torch.int64, device=device)
    for part in row_blocks(total, total):
        # Similarity is mutual: what lies left of the block has been seen from the other side.
        links = unit[part] @ unit[part.start :].T > threshold
        rows = torch.arange(part.stop - part.start, device=device)
        links[rows, rows] = True
        degree[part] += links.sum(dim=1)
        degree[part.stop :] += links[:, part.stop - part.start :].sum(dim=0)
        links &= label[part, None] != label[part.start :]
        left, right = label[part][links.nonzero()[:, 0]], label[part.start :][links.nonzero()[:, 1]]
        label = chain_heads(left, right, total)[label]
    return _numbered(label, degree)


def grouped(total: int, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Find the connected components of given links.

    Args:
        total: number of tokens.
        pairs: int64 ``[2, L]``.

    Returns:
        As of :func:`linked`.

    Example:
        >>> [part.tolist() for part in grouped(4, torch.tensor([[0, 3], [3, 1]]))]
        [[1, 1, 0, 1], [2, 3]]
    """
    label = chain_heads(pairs[0], pairs[1], total)
    return _numbered(label, torch.bincount(pairs.flatten(), minlength=total))


def _numbered(label: Tensor, degree: Tensor) -> tuple[Tensor, Tensor]:
    """Number components by the token with most links in each."""
    total = label.numel()
    tokens = torch.arange(total, device=label.device)
    most = torch.full_like(label, -1).scatter_reduce_(0, label, degree, "amax")[label]
    heads = torch.full_like(label, total).scatter_reduce_(0, label, torch.where(degree == most, tokens, total), "amin")
    heads, component = heads[label].unique(return_inverse=True)
    return component, heads


def candidate_links(
    features: Tensor, pieces: Sequence[Sequence[Tensor]], *, across: bool = True
) -> tuple[Tensor, Tensor]:
    """Compare tokens inside pieces of frames, with the next piece of the frame, and with the next frame.

    Args:
        features: ``[n, D]``.
        pieces: int64 tokens of each piece, frame by frame.
        across: whether pieces are compared with those at the same place of the next frame.

    Returns:
        int64 ``[2, L]`` pairs and float32 ``[L]`` their cosine similarities.

    Example:
        >>> pairs, similarity = candidate_links(torch.eye(3), [[torch.tensor([0, 1])], [torch.tensor([2])]])
        >>> pairs.tolist(), similarity.tolist()
        ([[0, 0, 1], [1, 2, 2]], [0.0, 0.0, 0.0])
    """
    unit = normalised(features)
    pairs, similarity = [], []
    for index, frame in enumerate(pieces):
        for number, piece in enumerate(frame):
            inside = torch.ones(piece.numel(), piece.numel(), dtype=torch.bool, device=piece.device).triu(1).nonzero()
            pairs.append(piece[inside].T)
            similarity.append((unit[piece] @ unit[piece].T)[inside[:, 0], inside[:, 1]])
            others = list(frame[number + 1 : number + 2])
            if across and index + 1 < len(pieces):
                others.append(pieces[index + 1][min(number, len(pieces[index + 1]) - 1)])
            for other in others:
                pairs.append(torch.cartesian_prod(piece, other).T)
                similarity.append((unit[piece] @ unit[other].T).flatten())
    return torch.cat(pairs, dim=1), torch.cat(similarity)


def spanning_links(pairs: Tensor, similarity: Tensor, total: int) -> Tensor:
    """Choose the links that join tokens at the highest similarities (a maximum spanning forest).

    The first m of them join tokens into the same components as all links of their strength would. In each round every
    component takes its strongest link to another, so that their number at least halves.

    Args:
        pairs: int64 ``[2, L]``, each pair once.
        similarity: float32 ``[L]``.
        total: number of tokens.

    Returns:
        int64 ``[2, m]`` links, the strongest first.

    Example:
        >>> pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> spanning_links(pairs, torch.tensor([0.1, 0.6, 0.8]), 3).tolist()
        [[1, 0], [2, 2]]
    """
    label = torch.arange(total, device=pairs.device)
    order = highest_first(similarity, similarity.numel())
    # From here on the rank stands for the link: no two are equal, so that links cannot form a ring.
    pairs = pairs[:, order]
    alive, found = torch.arange(order.numel(), device=pairs.device), []
    while alive.numel():
        left, right = label[pairs[0, alive]], label[pairs[1, alive]]
        apart = left != right
        alive, left, right = alive[apart], left[apart], right[apart]
        best = torch.full((total,), order.numel(), device=pairs.device)
        best = best.scatter_reduce_(0, left, alive, "amin").scatter_reduce_(0, right, alive, "amin")
        chosen = best[best < order.numel()].unique()
        found.append(chosen)
        label = chain_heads(label[pairs[0, chosen]], label[pairs[1, chosen]], total)[label]
    return pairs[:, torch.cat(found).sort().values] if found else pairs
