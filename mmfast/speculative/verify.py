"""Verification: which drafted tokens stay, so that the answer is distributed as if nothing had been drafted.

Laws are ``[V]`` tensors of probabilities after all processors. The model's law at a node is asked for with the node
and the drafted tokens that lead to it, the node's own included and the root not, and only at nodes that are
reached: processors see what plain decoding would show them. Uniforms are numbers in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.speculative.base import Draft
from mmfast.speculative.tree import children

NodeLaw = Callable[[int, tuple[int, ...]], Tensor]
"""Node and the drafted tokens that lead to it -> the model's law ``[V]`` of what follows."""
Uniform = Callable[[], float]
"""Gives the next random number, uniform in [0, 1)."""
Ended = Callable[[int], bool]
"""Is told every token the model gives, once and in order; True if the answer ends with it."""


@dataclass(frozen=True)
class Accepted:
    """What a round gives.

    Attributes:
        path: accepted nodes in order, beginning with 0, the root.
        token: the model's own token after them.
    """

    path: tuple[int, ...]
    token: int


@dataclass(frozen=True)
class Stopped:
    """Where the test of a draft ended.

    Attributes:
        path: accepted nodes in order, beginning with 0, the root.
        weights: ``[V]``, the law of the token that follows them.
        token: the token that follows them if it was accepted and ended the answer; None if it is to be drawn.
    """

    path: tuple[int, ...]
    weights: Tensor
    token: int | None = None

    def finish(self, uniform: Uniform) -> Accepted:
        """Draw the token that follows where there is none yet."""
        return Accepted(self.path, draw(self.weights, uniform()) if self.token is None else self.token)


def draw(weights: Tensor, uniform: float) -> int:
    """Draw a token: the lowest whose cumulative weight exceeds ``uniform`` times the sum.

    Args:
        weights: ``[V]``, not negative; need not sum to 1.
        uniform: in [0, 1).

    Returns:
        The token; never one of weight 0.

    Raises:
        ValueError: if weights are not finite, negative, or all 0.

    Example:
        >>> draw(torch.tensor([0.0, 1.0, 3.0]), 0.25)
        2
    """
    return int(draw_rows(weights, uniform))


def draw_rows(weights: Tensor, uniform: float | Tensor) -> Tensor:
    """Do what :func:`draw` does for each row of ``[..., V]`` weights; int64 ``[...]``.

    Example:
        >>> draw_rows(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.9, 0.9])).tolist()
        [1, 0]
    """
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[..., -1:]
    if not bool((torch.isfinite(total) & (total > 0) & (weights >= 0).all(dim=-1, keepdim=True)).all()):
        raise ValueError("a law to draw from holds nan, inf or negative entries, or nothing but zeros")
    bound = total * torch.as_tensor(uniform, dtype=torch.float64, device=weights.device)[..., None]
    # A parallel sum may rise over a weight of 0 by rounding: such a token does not count.
    return ((cumulative > bound) & (weights > 0)).byte().argmax(dim=-1)


def accepts(p: Tensor, q: float | Tensor, uniform: float | Tensor) -> Tensor:
    """Tell whether a token drawn with probability ``q`` is accepted where the model gives it ``p``.

    Not a quotient, so that nothing is divided by 0; strict, so that what the model never says is never accepted.

    Args:
        p: probabilities, any shape.
        q: probabilities, same shape.
        uniform: in [0, 1), same shape.

    Returns:
        bool, same shape.

    Example:
        >>> accepts(torch.tensor([0.25, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.0])).tolist()
        [True, False]
    """
    drawn = torch.as_tensor(q, dtype=torch.float64, device=p.device)
    return torch.as_tensor(uniform, dtype=torch.float64, device=p.device) * drawn < p.double()


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return the law after a token drawn from ``q`` was rejected: what ``p`` has beyond ``q``.

    Args:
        p: ``[..., V]`` law of the model.
        q: ``[..., V]`` law of the drafter.

    Returns:
        float64 ``[..., V]`` law; ``p`` itself where it nowhere exceeds ``q``.

    Example:
        >>> residual(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])).tolist()
        [0.0, 1.0]
    """
    target = p.double()
    beyond = (target - q.double()).clamp(min=0)
    total = beyond.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, beyond / total, target)


def walk(draft: Draft, choose: Callable[[int, tuple[int, ...]], int], ended: Ended | None = None) -> Accepted:
    """Follow the model's own choices through a draft as far as it goes.

    What is emitted is what plain decoding emits, greedy or sampled: the draft only decides for how many
    steps one forward is enough.

    Args:
        draft: a tree or a chain whose tokens were chosen, not drawn.
        choose: the token the model gives at a node, asked once for each node reached, in order; the second
            argument is the drafted tokens that lead there.
        ended: whether the answer ends with a token, whatever of the draft would follow.

    Returns:
        The nodes whose tokens the model gave, and its token where the draft has none like it.

    Example:
        >>> answer = (7, 8, 9)
        >>> walk(Draft((7, 5, 8), (0, 0, 1)), lambda node, tokens: answer[len(tokens)])
        Accepted(path=(0, 1, 3), token=9)
    """
    below: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.tree()[1:], strict=True), start=1):
        below.setdefault((parent, token), node)
    path: list[int] = [0]
    tokens: tuple[int, ...] = ()
    while True:
        token = choose(path[-1], tokens)
        over = ended is not None and ended(token)
        node = below.get((path[-1], token), 0)
        if over or not node:
            return Accepted(tuple(path), token)
        path.append(node)
        tokens = (*tokens, token)


def greedy(draft: Draft, logits: Tensor) -> Accepted:
    """Follow the likeliest tokens through a draft.

    Args:
        draft: a tree or a chain.
        logits: ``[nodes, V]``, the root's first, processed already; ties go to the lowest token.

    Example:
        >>> greedy(Draft((1, 1)), torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 1.0]]))
        Accepted(path=(0, 1, 2), token=0)
    """
    best = logits.argmax(dim=-1).tolist()
    return walk(draft, lambda node, _: int(best[node]))


def reject(draft: Draft, law: NodeLaw, uniform: Uniform, ended: Ended | None = None) -> Accepted:
    """Accept a drawn chain by rejection sampling (arXiv 2211.17192, algorithm 1; arXiv 2302.01318).

    Args:
        draft: a chain with the laws its tokens were drawn from.
        law: the model's law at each node reached.
        uniform: asked once per tested token and once for the token that follows.
        ended: whether the answer ends with a token, whatever of the draft would follow.

    Returns:
        The accepted nodes, and a token of what the model has beyond the drafter where one was rejected.

    Raises:
        ValueError: if the draft has tokens without laws, or over another vocabulary than the model's.

    Example:
        >>> draft = Draft((0,), laws=torch.tensor([[1.0, 0.0]]))
        >>> reject(draft, lambda node, tokens: torch.tensor([0.3, 0.7]), iter([0.5, 0.2]).__next__)
        Accepted(path=(0,), token=1)
    """
    stopped = try_chain(draft, law, uniform, ended)
    accepted = stopped.finish(uniform)
    if ended is not None and stopped.token is None:
        ended(accepted.token)
    return accepted


def try_chain(draft: Draft, law: NodeLaw, uniform: Uniform, ended: Ended | None = None) -> Stopped:
    """Do what :func:`reject` does, but leave the last token to be drawn."""
    if draft.laws is None and draft.tokens:
        raise ValueError("a draft without laws was chosen, not drawn; verify it with walk()")
    for node, token in enumerate(draft.tokens):
        target = law(node, draft.tokens[:node])
        drawn_from = _law_like(target, draft, node)
        place, weights = try_siblings(target, [token], [drawn_from], uniform)
        if place is None:
            return Stopped(tuple(range(node + 1)), weights)
        if ended is not None and ended(token):
            return Stopped(tuple(range(node + 1)), target, token)
    return Stopped(tuple(range(len(draft.tokens) + 1)), law(len(draft.tokens), draft.tokens))


def _law_like(target: Tensor, draft: Draft, node: int) -> Tensor:
    """The law a token of a chain was drawn from, on the device of the model's."""
    laws, token = draft.laws, draft.tokens[node]
    if laws is None or laws.shape[-1] != target.shape[-1] or not 0 <= token < target.shape[-1]:
        given = None if laws is None else laws.shape[-1]
        raise ValueError(
            f"drafted token {token} with a law over {given} tokens does not fit the model's {target.shape[-1]}; "
            "give the law over the model's vocabulary, 0 for tokens that cannot be drafted"
        )
    return laws[node].to(target.device)


def try_siblings(
    target: Tensor, tokens: Sequence[int], laws: Iterable[Tensor], uniform: Uniform
) -> tuple[int | None, Tensor]:
    """Test candidates for one position in turn (recursive rejection sampling).

    Args:
        target: ``[V]`` law of the model.
        tokens: candidates, in the order they were drawn.
        laws: the law ``[V]`` each was drawn from: with :func:`without_replacement` siblings that differ
            (arXiv 2402.14160), with the same law for each those of SpecInfer (arXiv 2305.09781), with
            :func:`certain` those that were chosen.
        uniform: asked once per tested candidate.

    Returns:
        Place of the accepted candidate, None if all were rejected, and the law that was left when the test
        ended: if all were rejected, that of the token to draw instead.

    Example:
        >>> target, drafter = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.5, 0.5, 0.0])
        >>> place, rest = try_siblings(target, [0, 1], without_replacement(drafter, [0, 1]), lambda: 0.9)
        >>> place, rest.tolist()
        (None, [0.0, 0.0, 1.0])
    """
    weights = target
    for place, (token, drawn_from) in enumerate(zip(tokens, laws, strict=False)):
        if accepts(weights[token], drawn_from[token], uniform()):
            return place, weights
        weights = residual(weights, drawn_from)
    return None, weights


def without_replacement(law: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
    """Give the laws of draws without replacement: each as the one before without the token drawn there.

    Args:
        law: ``[V]`` law of the first draw.
        tokens: what was drawn.

    Yields:
        ``[V]`` law of each draw. Ends where nothing is left that could have been drawn.

    Example:
        >>> [law.tolist() for law in without_replacement(torch.tensor([0.5, 0.25, 0.25]), [0, 2])]
        [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]
    """
    left = law.double()
    for token in tokens:
        total = left.sum()
        if not total > 0:
            return
        yield left / total
        left = left.index_fill(-1, torch.tensor([token], device=law.device), 0.0)


def certain(token: int, vocabulary: int) -> Tensor:
    """Return the law ``[V]`` of a token that was chosen and not drawn.

    Example:
        >>> certain(1, 3).tolist()
        [0.0, 1.0, 0.0]
    """
    law = torch.zeros(vocabulary, dtype=torch.float64)
    law[token] = 1.0
    return law


def reject_tree(draft: Draft, law: NodeLaw, uniform: Uniform) -> Accepted:
    """Test a tree of chosen tokens child by child.

    Gives the same distribution as :func:`walk` with tokens drawn from the law, but not the tokens that plain
    decoding would draw from the same random numbers.

    Args:
        draft: a tree or a chain whose tokens were chosen.
        law: the model's law at each node reached.
        uniform: asked once per tested child and once for the token that follows.

    Returns:
        The accepted nodes and the token that follows.

    Example:
        >>> half = torch.tensor([0.5, 0.25, 0.25])
        >>> reject_tree(Draft((1, 0), (0, 0)), lambda node, tokens: half, iter([0.3, 0.6, 0.9]).__next__)
        Accepted(path=(0, 2), token=2)
    """
    return try_tree(draft, law, uniform).finish(uniform)


def try_tree(draft: Draft, law: NodeLaw, uniform: Uniform) -> Stopped:
    """Do what :func:`reject_tree` does, but leave the last token to be drawn."""
    below = children(draft.tree())
    path: list[int] = [0]
    tokens: tuple[int, ...] = ()
    while True:
        target = law(path[-1], tokens)
        siblings = [draft.tokens[node - 1] for node in below[path[-1]]]
        laws = (certain(token, target.shape[-1]).to(target.device) for token in siblings)
        place, weights = try_siblings(target, siblings, laws, uniform)
        if place is None:
            return Stopped(tuple(path), weights)
        path.append(below[path[-1]][place])
        tokens = (*tokens, siblings[place])


@dataclass(frozen=True)
class SequentialChoice:
    """The rule of K-SEQ for candidates drawn independently from one law (arXiv 2310.15141).

    Attributes:
        rho: what the drafter's law is weighed with; the more, the less of the model's law each candidate takes.
        beta: probability that one candidate is accepted.
        acceptance: probability that any of them is.
        drawn_from: ``[V]``, the drafter's law times ``rho``.
        residual: ``[V]``, law of the token to draw where none is.
    """

    rho: float
    beta: float
    acceptance: float
    drawn_from: Tensor
    residual: Tensor

    def test(self, target: Tensor, tokens: Sequence[int], uniform: Uniform) -> tuple[int | None, Tensor]:
        """Test the candidates as :func:`try_siblings` does."""
        for place, token in enumerate(tokens):
            if accepts(target[token], self.drawn_from[token], uniform()):
                return place, target
        return None, self.residual


def k_seq(target: Tensor, law: Tensor, count: int) -> SequentialChoice:
    """Find the rule of K-SEQ for a position.

    Args:
        target: ``[V]`` law of the model.
        law: ``[V]`` law the candidates are drawn from.
        count: number of candidates, at least 1.

    Returns:
        The rule.

    Example:
        >>> rule = k_seq(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 2)
        >>> round(rule.rho, 6), round(rule.acceptance, 6), rule.residual.round(decimals=6).tolist()
        (1.707107, 0.5, [0.0, 1.0])
    """
    p, q = target.double(), law.double()

    def accepted(rho: float) -> float:
        return float(torch.minimum(q, p / rho).sum().clamp(max=1))

    low, high = 1.0, float(count)
    while low < (middle := (low + high) / 2) < high:
        beta = accepted(middle)
        low, high = (middle, high) if 1 - (1 - beta) ** count > middle * beta else (low, middle)
    beta = accepted(high)
    acceptance = 1 - (1 - beta) ** count
    taken = torch.minimum(q, p / high) * (acceptance / beta if beta > 0 else 0.0)
    return SequentialChoice(high, beta, acceptance, q * high, residual(p, taken))


def typical_lossy(law: Tensor, *, epsilon: float = 0.09, delta: float = 0.3) -> tuple[float, Tensor]:
    """Tell which tokens typical acceptance lets pass (arXiv 2401.10774). Changes the answer; nothing uses it unasked.

    Args:
        law: ``[V]`` law of the model.
        epsilon: probability above which a token always passes.
        delta: the same as a multiple of ``exp(-entropy)``; the lower of the two counts.

    Returns:
        The threshold, and bool ``[V]``.

    Example:
        >>> typical_lossy(torch.tensor([0.9, 0.06, 0.04]))[1].tolist()
        [True, False, False]
    """
    p = law.double()
    entropy = -(p * (p + 1e-5).log()).sum()
    threshold = min(epsilon, delta * float(torch.exp(-entropy)))
    return threshold, p > threshold
