"""Whole answers with drafts are those without, and what a draft must hold."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmfast.speculative.base import Draft
from mmfast.speculative.verify import (
    Accepted,
    draw,
    greedy,
    reject,
    reject_tree,
    try_siblings,
    typical_lossy,
    walk,
    without_replacement,
)
from support.acceptance import (
    Tables,
    chain,
)

ROUNDS, LEVEL = 200_000, 1e-4
CLOSE = {"atol": 1e-10, "rtol": 0.0}
POWER = json.loads((Path(__file__).parents[1] / "golden/speculative/stats_power.json").read_text(encoding="utf-8"))

STOP = 6


def random_laws(seed: int, vocabulary: int, sharpness: float = 1.0) -> Tables:
    """Laws that depend on everything before, the same for the same tokens."""

    def law(tokens: tuple[int, ...]) -> Tensor:
        source = torch.Generator().manual_seed(zlib.crc32(repr((seed, tokens)).encode()))
        return (torch.randn(vocabulary, generator=source, dtype=torch.float64) * sharpness).softmax(dim=-1)

    return law


def plain(law: Tables, uniforms: list[float], most: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != STOP):
        answer.append(draw(law(tuple(answer)), uniforms[len(answer)]))
    return answer


def drafted(
    law: Tables, uniforms: list[float], most: int, propose: Callable[[tuple[int, ...]], Draft]
) -> tuple[list[int], int]:
    """The answer, its first token from the prompt, and the number of rounds."""
    answer, rounds = [draw(law(()), uniforms[0])], 0
    while len(answer) < most and answer[-1] != STOP:
        rounds += 1
        before = tuple(answer)

        def choose(_: int, tokens: tuple[int, ...], before: tuple[int, ...] = before) -> int:
            assert tokens == tuple(answer[len(before) :])  # asked once per token, in order
            return draw(law((*before, *tokens)), uniforms[len(before) + len(tokens)])

        def ended(token: int) -> bool:
            answer.append(token)
            return token == STOP or len(answer) == most

        accepted = walk(propose(before), choose, ended)
        assert answer[-1] == accepted.token
        assert len(answer) - len(before) == len(accepted.path)
    return answer, rounds


def drafters(law: Tables, uniforms: list[float]) -> Iterator[tuple[str, Callable[[tuple[int, ...]], Draft]]]:
    oracle = plain(law, uniforms, len(uniforms))
    source = torch.Generator().manual_seed(13)

    def random_tree(_: tuple[int, ...]) -> Draft:
        size = int(torch.randint(1, 12, (), generator=source))
        tokens = torch.randint(0, 7, (size,), generator=source).tolist()
        return Draft(tuple(tokens), tuple(int(torch.randint(0, i + 1, (), generator=source)) for i in range(size)))

    def wrong(before: tuple[int, ...]) -> Draft:
        following = oracle[len(before) : len(before) + 3]
        return Draft(tuple((token + 1) % 7 for token in following))

    yield "empty", lambda _: Draft()
    yield "right", lambda before: Draft(tuple(oracle[len(before) : len(before) + 3]))
    yield "wrong", wrong
    yield "random trees", random_tree
    yield "no tokens at all", lambda _: Draft((-1, 7, 10**9))
    yield "the same twice", lambda before: Draft((oracle[len(before)],) * 3, (0, 0, 0))
    yield "stops inside", lambda before: Draft((*oracle[len(before) : len(before) + 1], STOP, STOP, 0))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drafted_the_answer_is_the_one_without_drafts(seed: int) -> None:
    law = random_laws(50 + seed, 7, 1.5)
    uniforms = torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    for most in (1, 2, 17, 50):
        answer = plain(law, uniforms, most)
        for name, propose in drafters(law, uniforms):
            found, rounds = drafted(law, uniforms, most, propose)
            assert found == answer, name
            if name == "right":
                assert rounds == math.ceil((len(answer) - 1) / 4)
            elif name in ("empty", "wrong", "no tokens at all"):
                assert rounds == len(answer) - 1


def test_greedy_follows_the_first_of_equal_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert greedy(Draft((2, 0)), logits) == Accepted((0,), 1)
    assert greedy(Draft((1, 2)), logits) == Accepted((0, 1), 0)
    assert greedy(Draft((2, 1), (0, 0)), logits) == Accepted((0, 2), 2)
    assert greedy(Draft(), logits[:1]) == Accepted((0,), 1)


def test_laws_are_made_for_reached_nodes_alone_and_in_order() -> None:
    law = torch.tensor([0.5, 0.5])
    asked: list[tuple[int, tuple[int, ...]]] = []

    def seen(node: int, tokens: tuple[int, ...]) -> Tensor:
        asked.append((node, tokens))
        return law

    draft = chain([0, 1, 0], [[0.5, 0.5]] * 3)
    assert reject(draft, seen, iter([0.9, 0.9, 0.9, 0.0]).__next__) == Accepted((0, 1, 2, 3), 0)
    assert asked == [(0, ()), (1, (0,)), (2, (0, 1)), (3, (0, 1, 0))]
    asked.clear()
    sure = chain([0, 1, 0], [[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    assert reject(sure, seen, iter([0.9, 0.5, 0.0]).__next__) == Accepted((0, 1), 0)  # 0.5 * 1 < 0.5 is false
    assert asked == [(0, ()), (1, (0,))]
    asked.clear()
    tree = Draft((0, 1, 1), (0, 0, 2))
    assert reject_tree(tree, seen, iter([0.5, 0.99, 0.6, 0.9]).__next__) == Accepted((0, 2), 0)
    assert asked == [(0, ()), (2, (1,))]


def test_of_siblings_alike_the_first_counts() -> None:
    answer = (5, 6, 7)
    assert walk(Draft((5, 5, 6), (0, 0, 1)), lambda _, tokens: answer[len(tokens)]) == Accepted((0, 1, 3), 7)


def test_a_walk_ends_with_the_answer_even_inside_the_draft() -> None:
    emitted: list[int] = []

    def ended(token: int) -> bool:
        emitted.append(token)
        return token == 2

    assert walk(Draft((1, 2, 3)), lambda node, _: node + 1, ended) == Accepted((0, 1), 2)
    assert emitted == [1, 2]


@pytest.mark.parametrize(
    ("stop", "path", "token"), [(1, (0, 1), 1), (0, (0,), 0), (2, (0, 1, 2), 2), (9, (0, 1, 2), 2)]
)
def test_a_drawn_chain_ends_with_the_answer(stop: int, path: tuple[int, ...], token: int) -> None:
    emitted: list[int] = []
    asked: list[tuple[int, ...]] = []

    def ended(given: int) -> bool:
        emitted.append(given)
        return given == stop

    def law(_: int, tokens: tuple[int, ...]) -> Tensor:
        assert list(tokens) == emitted  # processors know what was accepted when they are asked
        asked.append(tokens)
        return torch.tensor([0.25, 0.25, 0.5])

    draft = chain([0, 1, 0], [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    accepted = reject(draft, law, iter([0.4, 0.4, 0.9, 0.7]).__next__, ended)
    assert accepted == Accepted(path, token)
    assert [draft.tokens[node - 1] for node in path[1:]] + [token] == emitted
    assert len(asked) == len(path)


def test_a_chain_is_refused_without_its_laws_or_over_another_vocabulary() -> None:
    law = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="without laws"):
        reject(Draft((0,)), lambda *_: law, lambda: 0.0)
    for draft in (chain([0], [[0.5, 0.25, 0.25]]), chain([2], [[0.5, 0.5]]), chain([-1], [[0.5, 0.5]])):
        with pytest.raises(ValueError, match="does not fit"):
            reject(draft, lambda *_: law, lambda: 0.0)


def test_candidates_beyond_the_support_of_the_drafter_are_not_tested() -> None:
    asked = iter([0.99, 0.0])
    q, p = torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.9])
    place, weights = try_siblings(p, [0, 1], without_replacement(q, [0, 1]), asked.__next__)
    assert place is None
    assert weights.tolist() == [0.0, 1.0]
    assert next(asked) == 0.0


def test_typical_acceptance_lets_pass_what_the_model_would_not_always_say() -> None:
    threshold, passing = typical_lossy(torch.full((10,), 0.1))
    assert threshold == pytest.approx(0.03, rel=1e-3)
    assert bool(passing.all())
