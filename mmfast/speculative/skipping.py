"""Which sublayers of a model can be left out while it drafts for itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TRIED = 256
"""Sets among which a suggestion is chosen."""
_NOISE = 1e-2
_CURIOSITY = 2.5


@dataclass(frozen=True)
class Skips:
    """Sublayers that are left out.

    Attributes:
        attention: layers without attention, ascending.
        feed_forward: layers without feed-forward part, ascending.
    """

    attention: tuple[int, ...] = ()
    feed_forward: tuple[int, ...] = ()


def initial_skips(depth: int, fixed: Collection[int] = ()) -> Skips:
    """Return the sublayers to leave out before anything is known: both of every second layer.

    Args:
        depth: decoder layers.
        fixed: layers that have to run; the first and the last do anyway.

    Example:
        >>> initial_skips(8)
        Skips(attention=(1, 3, 5), feed_forward=(1, 3, 5))
    """
    layers = tuple(layer for layer in range(1, depth - 1, 2) if layer not in fixed)
    return Skips(layers, layers)


def searched_sublayers(depth: int, skip_ratio: float) -> int:
    """Return how many sublayers the search leaves out.

    Example:
        >>> searched_sublayers(32, 0.45)
        27
    """
    return int((depth - 2) * 2 * skip_ratio)


class SkipSearch:
    """Find the sublayers without which a model says most nearly the same.

    Args:
        depth: decoder layers.
        fixed: layers that have to run.
        count: sublayers to leave out; fewer where there are not as many.
        bayes_interval: every so many trials is suggested by what is known of the others, 0 for none.
        patience: trials without a better one after which the search ends.
        trials: trials at most.
        enough: share of tokens that is good enough to end the search.
        seed: of chance.
    """

    def __init__(
        self,
        depth: int,
        fixed: Collection[int],
        count: int,
        *,
        bayes_interval: int = 25,
        patience: int = 300,
        trials: int = 1000,
        enough: float = 0.95,
        seed: int = 1,
    ) -> None:
        free = [layer for layer in range(1, depth - 1) if layer not in fixed]
        self._places = [(kind, layer) for kind in (0, 1) for layer in free]
        self._count = min(count, len(self._places))
        self._interval, self._patience, self._most, self._enough = bayes_interval, patience, trials, enough
        self._chance = torch.Generator().manual_seed(seed)
        self._seen: list[tuple[frozenset[int], float]] = []
        self._since = 0
        self.best = initial_skips(depth, fixed) if self._count else Skips()
        self.score = -1.0
        self._trial = self._set_of(self.best)

    @property
    def ended(self) -> bool:
        """Whether another trial would be a waste."""
        tried = len(self._seen)
        few = len(self._places) <= self._count
        return few or self.score > self._enough or self._since >= self._patience or tried >= self._most

    @property
    def trial(self) -> Skips:
        """The sublayers to try next."""
        return self._skips(self._trial)

    def tell(self, score: float) -> None:
        """Note the share of tokens that came out the same without the sublayers of :attr:`trial`."""
        self._since += 1
        if score > self.score:
            self.best, self.score, self._since = self.trial, score, 0
        self._seen.append((self._trial, score))
        tried = len(self._seen)
        self._trial = self._suggested() if self._interval and tried % self._interval == 0 else self._drawn()

    def _set_of(self, skips: Skips) -> frozenset[int]:
        chosen = {(0, layer) for layer in skips.attention} | {(1, layer) for layer in skips.feed_forward}
        return frozenset(index for index, place in enumerate(self._places) if place in chosen)

    def _skips(self, chosen: Collection[int]) -> Skips:
        places = [self._places[index] for index in sorted(chosen)]
        return Skips(
            tuple(layer for kind, layer in places if kind == 0), tuple(layer for kind, layer in places if kind == 1)
        )

    def _drawn(self) -> frozenset[int]:
        return frozenset(torch.randperm(len(self._places), generator=self._chance)[: self._count].tolist())

    def _suggested(self) -> frozenset[int]:
        """Choose, of some random sets, the one with the highest hope under a Gaussian process over what is known."""
        candidates = [self._drawn() for _ in range(_TRIED)]
        recent = self._seen[-_TRIED:]
        known, asked = self._vectors([chosen for chosen, _ in recent]), self._vectors(candidates)
        scores = torch.tensor([score for _, score in recent], dtype=torch.float64)
        # Sets that share all but a few sublayers are near.
        kernel, across = (
            torch.exp(-(torch.cdist(known, other) ** 2) / max(1, self._count)) for other in (known, asked)
        )
        factor = torch.linalg.cholesky(kernel + _NOISE * torch.eye(len(recent), dtype=torch.float64))
        mean = scores.mean() + across.T @ torch.cholesky_solve((scores - scores.mean())[:, None], factor)[:, 0]
        spread = (1 - torch.linalg.solve_triangular(factor, across, upper=False).square().sum(dim=0)).clamp_min(0)
        scale = scores.std(correction=0)
        return candidates[int((mean + _CURIOSITY * scale * spread.sqrt()).argmax())]

    def _vectors(self, sets: Sequence[Collection[int]]) -> Tensor:
        found = torch.zeros(len(sets), len(self._places), dtype=torch.float64)
        for row, chosen in enumerate(sets):
            found[row, list(chosen)] = 1
        return found
