"""What a verification gives over all drafts and random numbers: exactly for small tables, by drawing for chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mmfast.speculative import verify
from mmfast.speculative.base import Draft

ALMOST_ONE = 1 - 2**-53
Tables = Callable[[tuple[int, ...]], Tensor]


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chain(tokens: Sequence[int], laws: Any) -> Draft:
    return Draft(tuple(tokens), laws=laws if isinstance(laws, Tensor) else doubles(laws))


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """How often each token is accepted once drafted: the share of uniforms that ``verify.accepts`` lets pass."""
    share = torch.where(q > 0, p / q.clamp(min=1e-300), 1.0).clamp(max=1) * (p > 0)
    below, above = (share - 1e-9).clamp(min=0), (share + 1e-9).clamp(max=ALMOST_ONE)
    sure = (share > 1e-8) & (q > 0)
    assert bool(verify.accepts(p, q, below)[sure].all())
    assert not bool(verify.accepts(p, q, above)[share < 1 - 1e-8].any())
    return share


def outcomes(draft: Draft, law: Tables) -> Iterator[tuple[float, verify.Stopped]]:
    """Every way the test of a drawn chain can end, with its probability."""
    laws = draft.laws
    assert laws is not None or not draft.tokens
    reached = 1.0
    for place, token in enumerate(draft.tokens):
        assert laws is not None
        chance = float(acceptance(law(draft.tokens[:place]), laws[place])[token])
        if chance < 1:
            stopped = verify.try_chain(
                draft, lambda _, tokens: law(tokens), iter([0.0] * place + [ALMOST_ONE]).__next__
            )
            assert stopped.path == tuple(range(place + 1))
            yield reached * (1 - chance), stopped
        reached *= chance
        if reached == 0:
            return
    stopped = verify.try_chain(draft, lambda _, tokens: law(tokens), iter([0.0] * len(draft.tokens)).__next__)
    assert stopped.path == tuple(range(len(draft.tokens) + 1))
    yield reached, stopped


def drafts(law: Tables, length: int) -> Iterator[tuple[float, Draft]]:
    """Every chain a drafter can draw, with its probability."""
    vocabulary = len(law(()))
    for tokens in product(range(vocabulary), repeat=length):
        laws = [law(tokens[:place]) for place in range(length)]
        chance = math.prod(float(row[token]) for row, token in zip(laws, tokens, strict=True))
        if chance > 0:
            yield chance, chain(tokens, torch.stack(laws) if laws else torch.zeros(0, vocabulary))


def sequences(law: Tables, length: int) -> Tensor:
    """Law of the first tokens of plain decoding, ``[V] * length``."""
    vocabulary = len(law(()))
    found = torch.zeros([vocabulary] * length, dtype=torch.float64)
    for tokens in product(range(vocabulary), repeat=length):
        found[tokens] = math.prod(float(law(tokens[:place])[token]) for place, token in enumerate(tokens))
    return found


@dataclass(frozen=True)
class Enumerated:
    """What rounds with drawn chains give: law of the first tokens, law of the number accepted."""

    joint: Tensor
    accepted: Tensor


def enumerate_rounds(target: Tables, drafter: Tables, gamma: int, length: int) -> Enumerated:
    """Go through all drafts and ends of a round; tokens that are still missing come from the model alone."""
    vocabulary = len(target(()))
    joint = torch.zeros([vocabulary] * length, dtype=torch.float64)
    accepted = torch.zeros(gamma + 1, dtype=torch.float64)
    for drawn, draft in drafts(drafter, gamma):
        for chance, stopped in outcomes(draft, target):
            count = len(stopped.path) - 1
            accepted[count] += drawn * chance
            for token in range(vocabulary):
                weight = drawn * chance * float(stopped.weights[token] / stopped.weights.sum())
                emitted = (*draft.tokens[:count], token)
                for rest in product(range(vocabulary), repeat=max(0, length - len(emitted))):
                    whole, share = emitted, weight
                    for following in rest:
                        share *= float(target(whole)[following])
                        whole = (*whole, following)
                    joint[whole[:length]] += share
    return Enumerated(joint, accepted)


def integrate_siblings(p: Tensor, laws: Callable[[list[int]], Iterable[Tensor]], count: int) -> tuple[float, Tensor]:
    """Go through all candidates for one position.

    Args:
        p: law of the model.
        laws: the laws that candidates are drawn from, of the candidates.
        count: number of candidates.

    Returns:
        Probability that one of them is accepted, and the law of the token that comes out.
    """
    accepted, output = 0.0, torch.zeros_like(p)
    # Candidates rejected so far, with what probability, and what they leave of the model's law.
    open_: list[tuple[list[int], float, Tensor]] = [([], 1.0, p)]
    while open_:
        rejected, chance, rest = open_.pop()
        drawn = [law for law, _ in zip(laws([*rejected, 0]), range(len(rejected) + 1), strict=False)]
        if len(rejected) == count or len(drawn) == len(rejected):  # no more wanted, or none left to draw
            output += chance * rest
            continue
        share = acceptance(rest, drawn[-1])
        accepted += chance * float((drawn[-1] * share).sum())
        output += chance * drawn[-1] * share
        after = verify.residual(rest, drawn[-1])
        for token, missed in enumerate((drawn[-1] * (1 - share)).tolist()):
            if missed > 0:
                open_.append(([*rejected, token], chance * missed, after))
    return accepted, output


# One position, with the mistakes that are easily made. A rule says with what probability a token is accepted
# once drafted, and from what a token is drawn when it was rejected, or when nothing was drafted.


@dataclass(frozen=True)
class Step:
    """Verification of one drafted token, row by row: what is correct, and what a mistake replaces.

    Attributes:
        accepts: of the model's and the drafter's probability and a uniform.
        residual: of the law that follows a rejection.
        believed: the drafter's law as verification has it.
        kept: whether a token stays in the draft, of the drafter's probability of it.
    """

    accepts: Callable[[Tensor, Tensor, Tensor], Tensor] = verify.accepts
    residual: Callable[[Tensor, Tensor], Tensor] = verify.residual
    believed: Callable[[Tensor], Tensor] = lambda q: q
    kept: Callable[[Tensor], Tensor] = lambda q: torch.ones_like(q, dtype=torch.bool)

    def law(self, p: Tensor, q: Tensor) -> Tensor:
        """Exact law ``[V]`` of the token this gives, integrated over drafts and uniforms."""
        grid = torch.linspace(0, ALMOST_ONE, 2, dtype=torch.float64)
        believed = self.believed(q)
        share = acceptance(p, believed)
        if self.accepts is not verify.accepts:  # a rule that does not ask the uniform
            low, high = (self.accepts(p, believed, u.expand_as(p)) for u in grid)
            assert torch.equal(low, high)
            share = low.double()
        kept = self.kept(q)
        rejected = float((q * kept * (1 - share)).sum())
        dropped = float((q * ~kept).sum())
        return q * kept * share + rejected * self.residual(p, believed) + dropped * p

    def rounds(self, p: Tensor, q: Tensor, drafted: Tensor, tests: Tensor, draws: Tensor) -> Tensor:
        """Tokens ``[R]`` of R rounds, from rows of laws ``[R, V]``."""
        at = drafted[:, None]
        believed = self.believed(q)
        kept = self.kept(q.gather(1, at)[:, 0])
        passed = self.accepts(p.gather(1, at)[:, 0], believed.gather(1, at)[:, 0], tests) & kept
        weights = torch.where(kept[:, None], self.residual(p, believed), p.double())
        return torch.where(passed, drafted, verify.draw_rows(weights, draws))


def warped(p: Tensor, temperature: float) -> Tensor:
    hot = p ** (1 / temperature)
    return hot / hot.sum(dim=-1, keepdim=True)


def _apart(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs() / (p - q).abs().sum(dim=-1, keepdim=True)


def mistakes(cold: tuple[Tensor, Tensor], threshold: float) -> dict[str, Step]:
    """Each mistake by its name.

    Args:
        cold: laws of the model and the drafter without the temperature of the call.
        threshold: below which a drafter's probability counts as low.
    """
    return {
        "resample_from_p_on_reject": Step(residual=lambda p, q: p.double()),
        "accept_if_p_ge_q_only": Step(accepts=lambda p, q, _: p >= q),
        "residual_without_renorm_or_clip(abs)": Step(residual=_apart),
        "q_from_wrong_token_mapping": Step(believed=lambda q: q.roll(1, dims=-1)),
        "temperature_forgotten_in_residual": Step(residual=lambda p, _: verify.residual(*cold).expand_as(p)),
        "low_confidence_token_dropped_after_sampling": Step(kept=lambda q: q >= threshold),
    }


def sibling_rounds(p: Tensor, tokens: Tensor, laws: Sequence[Tensor], tests: Tensor, draws: Tensor) -> Tensor:
    """Tokens ``[R]`` of R rounds with candidates ``[R, k]`` drawn from k times ``[R, V]`` laws, tested in turn."""
    weights, found = p.double(), torch.full((len(tokens),), -1)
    for place, law in enumerate(laws):
        at = tokens[:, place : place + 1]
        passed = verify.accepts(weights.gather(1, at), law.gather(1, at), tests[:, place : place + 1])[:, 0]
        found = torch.where((found < 0) & passed, at[:, 0], found)
        weights = verify.residual(weights, law)
    return torch.where(found < 0, verify.draw_rows(weights, draws), found)


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Probability of counts at least as far from a law; cells that expect fewer than 5 are merged."""
    expected = law.flatten().double() * float(counts.sum())
    seen = counts.flatten().double()
    if bool((seen[expected == 0] > 0).any()):
        return 0.0  # what cannot happen did
    order = expected.argsort()
    expected, seen = expected[order], seen[order]
    small = int((expected < 5).sum())
    while 0 < small < len(expected) and float(expected[:small].sum()) < 5:
        small += 1
    if small:
        expected = torch.cat([expected[:small].sum()[None], expected[small:]])
        seen = torch.cat([seen[:small].sum()[None], seen[small:]])
    if len(seen) == 1:
        return 1.0
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(doubles((len(seen) - 1) / 2), statistic / 2))
