"""Losses that draft heads are trained with.

p is the law of the model, q that of the drafter; a row is one position. Masks are numbers, 1 for a position that
counts; a mean over a mask is 0 where nothing counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average ``[n]`` over the positions of a mask ``[n]``; None counts all.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 1.0])).item()
        3.5
    """
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    total = mask.sum()
    # Not a product alone: what does not count may be infinite.
    return torch.where(mask > 0, values * mask, 0.0).sum() / torch.where(total > 0, total, 1.0)


def soft_cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``-sum p log q`` per position.

    Args:
        p: ``[n, V]``.
        log_q: ``[n, V]``; ``-inf`` is allowed where p is 0.

    Returns:
        ``[n]``.
    """
    return -_weighted(p, log_q).sum(dim=-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the sum of ``|p - q|`` per position: ``[n, V]`` to ``[n]``."""
    return (p - q).abs().sum(dim=-1) / 2


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return ``KL(p || q)`` per position: ``[n, V]`` to ``[n]``; the other way round for exchanged arguments."""
    return (_weighted(p, p.log()) - _weighted(p, q.log())).sum(dim=-1)


def _weighted(p: Tensor, logs: Tensor) -> Tensor:
    return torch.where(p > 0, p * logs, 0.0)


def advantage(reward: Tensor) -> Tensor:
    """Return how far each reward is above the mean, in population standard deviations; 0 where all are equal."""
    spread = reward.std(unbiased=False)
    return torch.where(spread > 0, (reward - reward.mean()) / spread, 0.0)


def acceptance_reward(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """Return 1 where the model likes a drawn token better than the drafter does.

    Args:
        p: ``[n, V]``.
        q: ``[n, V]``.
        tokens: ``[n]``, drawn from q.
    """
    places = tokens[:, None]
    return (p.gather(1, places) > q.gather(1, places)).squeeze(1).to(p.dtype)


def tvd_plus_plus(p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    """Return the policy gradient form of total variation (arXiv 2403.00858).

    Args:
        p: ``[n, V]``.
        log_q: ``[n, V]``, through which gradients flow.
        tokens: ``[n]`` int64, drawn from q.

    Returns:
        Minus the mean of advantage times log q of the tokens. The advantages are constants.
    """
    weight = advantage(acceptance_reward(p, log_q.detach().exp(), tokens))
    return -(weight * log_q.gather(1, tokens[:, None]).squeeze(1)).mean()


def smooth_l1(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Return SmoothL1 with beta 1, its mean over the width: ``[n, D]`` to ``[n]``."""
    return functional.smooth_l1_loss(predicted, wanted, reduction="none").mean(dim=-1)


def eagle1(
    features: Tensor,
    wanted: Tensor,
    p: Tensor,
    log_q: Tensor,
    mask: Tensor | None = None,
    *,
    value: float = 1.0,
    prob: float = 0.1,
) -> Tensor:
    """Return the loss of EAGLE-1 and MSD: SmoothL1 of hidden states and cross-entropy of laws.

    Args:
        features: ``[n, D]``, foretold hidden states.
        wanted: ``[n, D]``, those of the model.
        p: ``[n, V]``.
        log_q: ``[n, V]``, of the foretold states through the model's output layer.
        mask: ``[n]``.
        value: weight of the first part.
        prob: weight of the second.
    """
    first = masked_mean(smooth_l1(features, wanted), mask)
    return value * first + prob * masked_mean(soft_cross_entropy(p, log_q), mask)


def list_mle(p: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Return how unlikely the drafter finds the model's order of its likeliest tokens.

    Args:
        p: ``[n, V]``.
        logits: ``[n, V]`` of the drafter, up to a constant per row.
        top_k: length of the order; equal p in order of the ids.

    Returns:
        ``[n]``: ``-sum_j (z_j - logsumexp(z_j .. z_k))`` over the ``top_k`` tokens.
    """
    order = p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    z = logits.gather(1, order)
    rest = z.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return (rest - z).sum(dim=-1)


def vispec(
    p: Tensor, log_q: Tensor, mask: Tensor | None = None, *, top_k: int = 10, value: float = 10.0, rank: float = 0.1
) -> Tensor:
    """Return the loss of ViSpec's second stage: L1 of the laws, and the order of the likeliest tokens.

    Args:
        p: ``[n, V]``.
        log_q: ``[n, V]``.
        mask: ``[n]``.
        top_k: length of the order.
        value: weight of the first part.
        rank: weight of the second.
    """
    first = masked_mean(2 * total_variation(p, log_q.exp()), mask)
    return value * first + rank * masked_mean(list_mle(p, log_q, top_k), mask)


def decayed(losses: Sequence[Tensor], decay: float = 0.8, first: int = 0) -> Tensor:
    """Add up losses with weights ``decay ** (first + i)``.

    EAGLE-3 weights the steps of its unroll with ``first=0``, Medusa its heads with ``first=1``.

    Example:
        >>> round(decayed([torch.tensor(1.0), torch.tensor(1.0)], 0.5, first=1).item(), 3)
        0.75
    """
    return torch.stack([decay ** (first + index) * loss for index, loss in enumerate(losses)]).sum()
