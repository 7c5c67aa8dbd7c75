"""Operations as one would write them first: what kernels and their torch forms are held against.

Each works on one batch ``[B, N, D]`` image by image and gives what the operation of the same name gives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def max_min_select(features: Tensor, kept: int) -> Tensor:
    """Pick what is farthest from all picks, looking at all of them again for each pick.

    Returns:
        int64 ``[B, K]``.

    Example:
        >>> max_min_select(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]), 2).tolist()
        [[2, 0]]
    """
    found = []
    for image in features:
        unit = normalize(image.float(), dim=-1)
        distance = 1 - unit @ unit.T
        distance.fill_diagonal_(torch.inf)
        picks = [int(distance.amin(dim=0).argmax())]
        for _ in range(kept - 1):
            nearest = distance[picks].amin(dim=0)
            nearest[picks] = -torch.inf
            picks.append(int(nearest.argmax()))
        found.append(picks)
    return torch.tensor(found, device=features.device)


def conditional_dpp(features: Tensor, relevance: Tensor, kept: int) -> Tensor:
    """Write the whole kernel down, then pick by its Cholesky factor.

    Returns:
        int64 ``[B, K]``.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> conditional_dpp(features, torch.ones(1, 3), 2).tolist()
        [[0, 2]]
    """
    found = []
    for image, own in zip(features, relevance, strict=True):
        unit = normalize(image.float(), dim=-1)
        kernel = own.float()[:, None] * (unit @ unit.T) * own.float()
        gain = kernel.diagonal().clone()
        rows: list[Tensor] = []
        picks: list[int] = []
        for _ in range(kept):
            pick = int(gain.argmax())
            row = kernel[pick].clone()
            for before in rows:
                row -= before[pick] * before
            row /= gain[pick].clamp_min(1e-30).sqrt()
            gain = gain - row.square()
            gain[pick] = -torch.inf
            rows.append(row)
            picks.append(pick)
        found.append(picks)
    return torch.tensor(found, device=features.device)


def greedy_cover_cosine(features: Tensor, kept: int) -> Tensor:
    """Compute the gain of every row anew for each pick.

    Returns:
        int64 ``[B, K]``.

    Example:
        >>> greedy_cover_cosine(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]), 2).tolist()
        [[1, 2]]
    """
    found = []
    for image in features:
        unit = normalize(image.float(), dim=-1)
        weights = unit @ unit.T
        covered = torch.zeros(len(unit), device=unit.device)
        picks: list[int] = []
        for _ in range(kept):
            gain = (weights - covered).clamp_min(0.0).sum(dim=1)
            gain[picks] = -torch.inf
            picks.append(int(gain.argmax()))
            covered = torch.maximum(covered, weights[picks[-1]])
        found.append(picks)
    return torch.tensor(found, device=features.device)


def dpc_knn(features: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Look for the nearest denser row, row by row.

    Returns:
        int64 ``[B, K]`` centres and int64 ``[B, N]`` cluster of each row.

    Example:
        >>> centres, owner = dpc_knn(torch.tensor([[[0.0], [2.0], [10.0], [12.0]]]), 2)
        >>> centres.tolist(), owner.tolist()
        ([[0, 2]], [[0, 0, 1, 1]])
    """
    centres, owners = [], []
    for image in features:
        values = image.float()
        distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / values.shape[1] ** 0.5
        density = -distance.topk(clusters, dim=-1, largest=False).values.square().mean(dim=-1)
        order = density.sort(descending=True, stable=True).indices
        apart = distance.max().repeat(len(values))
        for place, row in enumerate(order.tolist()):
            if place:
                apart[row] = distance[row, order[:place]].min()
        best = (density + apart.log()).sort(descending=True, stable=True).indices[:clusters]
        owner = distance[best].argmin(dim=0)
        owner[best] = torch.arange(clusters, device=owner.device)
        centres.append(best)
        owners.append(owner)
    return torch.stack(centres), torch.stack(owners)


def bipartite_merge(features: Tensor, merges: int) -> Tensor:
    """Add rows into their partners where they lie, and divide by how many there are.

    Returns:
        ``[B, N - merges, D]``.

    Example:
        >>> bipartite_merge(torch.tensor([[[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]]]), 1).tolist()
        [[[0.0, 1.0], [3.0, 0.0]]]
    """
    found = []
    for image in features:
        unit = normalize(image.float(), dim=-1)
        closeness, partner = (unit[0::2] @ unit[1::2].T).max(dim=1)
        order = closeness.sort(descending=True, stable=True).indices
        goes, stays = order[:merges], order[merges:]
        even, odd = image[0::2].float(), image[1::2].float().clone()
        members = torch.ones(len(odd), 1, device=image.device)
        odd.index_add_(0, partner[goes], even[goes])
        members.index_add_(0, partner[goes], torch.ones(merges, 1, device=image.device))
        found.append(torch.cat([even[stays], odd / members]).to(image.dtype))
    return torch.stack(found)


def read_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attend as models do when asked for their attention: the whole matrix is made and returned.

    Args:
        query: ``[B, H, N, d]``.
        key: ``[B, G, N, d]``.
        value: ``[B, G, N, d]``.

    Returns:
        Output ``[B, H, N, d]`` and probabilities ``[B, H, N, N]`` in the dtype of the query.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> read_attention(states, states, states)[1].tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    share, tokens = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (states.repeat_interleave(share, dim=1) for states in (key, value))
    logits = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    probabilities = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ values, probabilities
