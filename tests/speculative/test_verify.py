"""Verification: the answer is distributed as without drafts, and what breaks that is noticed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from mmfast.speculative.verify import (
    accepts,
    certain,
    draw,
    draw_rows,
    k_seq,
    reject,
    residual,
    try_siblings,
    without_replacement,
)
from support.acceptance import (
    ALMOST_ONE,
    Step,
    Tables,
    acceptance,
    chain,
    chi_square,
    doubles,
    enumerate_rounds,
    integrate_siblings,
    mistakes,
    sequences,
    sibling_rounds,
    warped,
)

ROUNDS, LEVEL = 200_000, 1e-4
CLOSE = {"atol": 1e-10, "rtol": 0.0}
POWER = json.loads((Path(__file__).parents[1] / "golden/speculative/stats_power.json").read_text(encoding="utf-8"))


def random_laws(seed: int, vocabulary: int, sharpness: float = 1.0) -> Tables:
    """Laws that depend on everything before, the same for the same tokens."""

    def law(tokens: tuple[int, ...]) -> Tensor:
        source = torch.Generator().manual_seed(zlib.crc32(repr((seed, tokens)).encode()))
        return (torch.randn(vocabulary, generator=source, dtype=torch.float64) * sharpness).softmax(dim=-1)

    return law


def sparse(law: Tables, tokens: set[int]) -> Tables:
    """The same laws without some tokens."""

    def without(before: tuple[int, ...]) -> Tensor:
        rest = law(before).index_fill(0, torch.tensor(sorted(tokens)), 0.0)
        return rest / rest.sum()

    return without


# Drawing


def test_draw_takes_the_lowest_token_beyond_the_bound() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    assert [draw(weights, u) for u in (0.0, 0.49, 0.5, 0.74, 0.75, ALMOST_ONE)] == [1, 1, 3, 3, 4, 4]
    assert draw_rows(weights.repeat(2, 1), torch.tensor([0.0, 0.9])).tolist() == [1, 4]


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-1.0, 2.0]])
def test_draw_refuses_what_is_no_law(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="law to draw from"):
        draw(torch.tensor(bad), 0.5)


def test_a_token_the_model_never_says_is_never_accepted() -> None:
    assert not accepts(torch.tensor(0.0), torch.tensor(0.0), 0.0)
    assert not accepts(torch.tensor(0.0), torch.tensor(1.0), 0.0)
    assert accepts(torch.tensor(1e-30), torch.tensor(0.0), ALMOST_ONE)


def test_the_residual_of_equal_laws_is_the_law() -> None:
    law = torch.tensor([0.25, 0.75])
    assert residual(law, law).tolist() == law.tolist()


def test_half_precision_laws_are_compared_exactly() -> None:
    p, q = torch.tensor([0.1, 0.9], dtype=torch.bfloat16), torch.tensor([0.9, 0.1], dtype=torch.bfloat16)
    expected = residual(p.double(), q.double())
    assert torch.equal(residual(p, q), expected)
    share = float(p[0].double() / q[0].double())
    assert accepts(p[0], q[0], share - 1e-12)
    assert not accepts(p[0], q[0], share + 1e-12)


# Enumeration

PAIRS: dict[str, tuple[Tables, Tables]] = {
    "random": (random_laws(1, 3), random_laws(2, 3)),
    "far": (random_laws(3, 3, 4.0), random_laws(4, 3, 4.0)),
    "equal": (random_laws(5, 3), random_laws(5, 3)),
    "disjoint": (sparse(random_laws(6, 4), {0, 2}), sparse(random_laws(7, 4), {1, 3})),
    "never_said": (sparse(random_laws(8, 4), {1}), random_laws(9, 4)),
    "never_drafted": (random_laws(10, 4), sparse(random_laws(11, 4), {0, 3})),
    "one_token": (random_laws(12, 4), sparse(random_laws(13, 4), {0, 1, 3})),
}


@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_every_draft_and_every_end_together_are_plain_decoding(name: str, gamma: int) -> None:
    target, drafter = PAIRS[name]
    if len(target(())) == 4 and gamma == 3:
        gamma = 2
    found = enumerate_rounds(target, drafter, gamma, 2)
    torch.testing.assert_close(found.joint, sequences(target, 2), **CLOSE)
    torch.testing.assert_close(found.accepted.sum(), doubles(1.0), **CLOSE)
    if gamma:
        rejected = 1 - float(torch.minimum(target(()), drafter(())).sum())
        assert float(found.accepted[0]) == pytest.approx(rejected, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_several_candidates_together_are_plain_decoding(name: str, count: int) -> None:
    p, q = PAIRS[name][0](()), PAIRS[name][1](())
    single = float((q * acceptance(p, q)).sum())
    apart, output = integrate_siblings(p, lambda tokens: without_replacement(q, tokens), count)
    torch.testing.assert_close(output, p, **CLOSE)
    again, output = integrate_siblings(p, lambda _: repeat(q), count)
    torch.testing.assert_close(output, p, **CLOSE)
    rule = k_seq(p, q, count)
    taken = q * acceptance(p, rule.drawn_from)
    share = rule.acceptance / rule.beta if rule.beta else 0.0
    torch.testing.assert_close(taken * share + (1 - rule.acceptance) * rule.residual, p, atol=1e-7, rtol=0.0)
    assert single - 1e-9 <= again <= apart + 1e-9
    assert again - 1e-9 <= rule.acceptance + 1e-7
    if count == 1:
        assert again == pytest.approx(apart, abs=1e-12)
        assert rule.acceptance == pytest.approx(single, abs=1e-9)


def test_candidates_that_were_chosen_are_accepted_as_often_as_the_model_says_them() -> None:
    p = random_laws(20, 5)(())
    for tokens in ([3], [4, 0], [2, 0, 1], [1, 1]):
        accepted, output = 0.0, torch.zeros_like(p)
        chance, rest = 1.0, p
        for token in tokens:
            share = float(acceptance(rest, certain(token, 5))[token])
            output[token] += chance * share
            accepted += chance * share
            chance *= 1 - share
            rest = residual(rest, certain(token, 5))
        torch.testing.assert_close(output + chance * rest, p, **CLOSE)
        assert accepted == pytest.approx(float(p[list(set(tokens))].sum()), abs=1e-12)


def test_k_seq_accepts_as_its_rule_says() -> None:
    p, q = random_laws(30, 4)(()), random_laws(31, 4)(())
    rule = k_seq(p, q, 3)
    tokens = [2, 0, 2]
    bounds = [min(1.0, float(p[token] / (rule.rho * q[token]))) for token in tokens]
    for place in range(3):
        uniforms = [min(bound + 1e-9, ALMOST_ONE) for bound in bounds[:place]] + [bounds[place] - 1e-9]
        assert rule.test(p, tokens, iter(uniforms).__next__)[0] == place
    place, weights = rule.test(p, tokens, repeat(ALMOST_ONE).__next__)
    assert place is None
    assert weights is rule.residual


# Statistics

Q = random_laws(41, 8)
HISTORY = [1, 4]


def processed(*processors: Callable[[Tensor, Tensor], Tensor]) -> Tables:
    """Laws after processors that see all tokens before."""
    raw = random_laws(40, 8, 1.5)

    def law(tokens: tuple[int, ...]) -> Tensor:
        scores = raw(tokens).log()[None]
        for processor in processors:
            scores = processor(torch.tensor([[*HISTORY, *tokens]]), scores)
        return scores.softmax(dim=-1)[0]

    return law


SCENES: dict[str, tuple[Tables, Tables]] = {
    "plain": (processed(), Q),
    "temperature": (processed(TemperatureLogitsWarper(0.7)), Q),
    "top_p": (processed(TopPLogitsWarper(0.8)), Q),
    "repetition_penalty": (processed(RepetitionPenaltyLogitsProcessor(1.3)), Q),
    "one_hot": (processed(), lambda tokens: certain(int(Q(tokens).argmax()), 8)),
    "disjoint": (sparse(processed(), {0, 1, 2, 3}), sparse(Q, {4, 5, 6, 7})),
    "equal": (processed(), processed()),
}


def rows(law: Tables) -> tuple[Tensor, Tensor]:
    """Laws ``[V]`` of the first token and ``[V, V]`` of the second after each first."""
    first = law(())
    return first, torch.stack([law((token,)) for token in range(len(first))])


def two_tokens(step: Step, target: Tables, drafter: Tables, source: torch.Generator, rounds: int = ROUNDS) -> Tensor:
    """First two tokens ``[R, 2]`` of rounds, each token drafted."""
    (p, p_next), (q, q_next) = rows(target), rows(drafter)
    one = one_token(step, p.expand(rounds, -1), q.expand(rounds, -1), source)
    return torch.stack([one, one_token(step, p_next[one], q_next[one], source)], dim=1)


def one_token(step: Step, p: Tensor, q: Tensor, source: torch.Generator) -> Tensor:
    drafts, tests, draws = torch.rand(3, len(p), generator=source, dtype=torch.float64)
    return step.rounds(p, q, draw_rows(q, drafts), tests, draws)


def counted(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each combination of the columns was seen."""
    flat = torch.zeros(len(tokens), dtype=torch.int64)
    for column in tokens.unbind(dim=1):
        flat = flat * vocabulary + column
    return torch.bincount(flat, minlength=vocabulary ** tokens.shape[1])


def chances(tokens: Tensor, target: Tables) -> tuple[float, float]:
    """What the test says of the first token and of the first two."""
    vocabulary = len(target(()))
    one, two = counted(tokens[:, :1], vocabulary), counted(tokens, vocabulary)
    return chi_square(one, target(())), chi_square(two, sequences(target, 2))


@pytest.mark.parametrize("name", SCENES)
def test_drawn_chains_give_the_law_of_the_model(name: str) -> None:
    target, drafter = SCENES[name]
    tokens = two_tokens(Step(), target, drafter, torch.Generator().manual_seed(7))
    assert min(chances(tokens, target)) > LEVEL


def test_rows_of_rounds_are_what_single_rounds_give() -> None:
    target, drafter = SCENES["top_p"]
    p, q = target(()), drafter(())
    drafts, tests, draws = torch.rand(3, 500, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    drafted = draw_rows(q.expand(500, -1), drafts)
    many = Step().rounds(p.expand(500, -1), q.expand(500, -1), drafted, tests, draws).tolist()
    for token, first, second, result in zip(drafted.tolist(), tests.tolist(), draws.tolist(), many, strict=True):
        accepted = reject(chain([token], q[None]), lambda *_: p, iter([first, second]).__next__)
        assert (token if len(accepted.path) > 1 else accepted.token) == result


@pytest.mark.parametrize("kind", ["chosen", "apart", "again"])
def test_trees_with_three_children_give_the_law_of_the_model(kind: str) -> None:
    source = torch.Generator().manual_seed(9)
    (p, p_next), q = rows(SCENES["plain"][0]), SCENES["plain"][1](())

    def siblings(target: Tensor) -> Tensor:
        count = len(target)
        if kind == "chosen":
            tokens = torch.tensor([5, 0, 3]).expand(count, 3)
            laws = [certain(token, 8).expand(count, -1) for token in (5, 0, 3)]
        else:
            drawn, laws, left = [], [], q.expand(count, -1)
            for _ in range(3):
                laws.append(left / left.sum(dim=-1, keepdim=True))
                drawn.append(draw_rows(left, torch.rand(count, generator=source, dtype=torch.float64)))
                left = left.scatter(1, drawn[-1][:, None], 0.0) if kind == "apart" else left
            tokens = torch.stack(drawn, dim=1)
        tests = torch.rand(count, 4, generator=source, dtype=torch.float64)
        found = sibling_rounds(target, tokens, laws, tests, tests[:, 3])
        for row in range(100):
            given = tokens[row].tolist()
            own = {
                "chosen": lambda given: [certain(token, 8) for token in given],
                "apart": lambda given: without_replacement(q, given),
                "again": lambda _: repeat(q),
            }[kind](given)
            place, weights = try_siblings(target[row], given, own, iter(tests[row].tolist()).__next__)
            single = draw(weights, float(tests[row, 3])) if place is None else given[place]
            assert single == int(found[row])
        return found

    one = siblings(p.expand(ROUNDS, -1))
    tokens = torch.stack([one, siblings(p_next[one])], dim=1)
    assert min(chances(tokens, SCENES["plain"][0])) > LEVEL


def test_rows_of_a_batch_give_their_own_laws_and_do_not_know_of_each_other() -> None:
    scenes = [SCENES["plain"], SCENES["top_p"], SCENES["repetition_penalty"]]
    sources = [torch.Generator().manual_seed(100 + row) for row in range(3)]
    firsts, taken = [], []
    for row, ((target, drafter), source) in enumerate(zip(scenes, sources, strict=True)):
        before = (row,) * row  # answers of different lengths

        def law(tokens: tuple[int, ...], own: Tables = target, before: tuple[int, ...] = before) -> Tensor:
            return own((*before, *tokens))

        if row == 0:  # a row without drafts
            p, p_next = rows(law)
            drawn = torch.rand(2, ROUNDS, generator=source, dtype=torch.float64)
            one = draw_rows(p.expand(ROUNDS, -1), drawn[0])
            tokens = torch.stack([one, draw_rows(p_next[one], drawn[1])], dim=1)
        else:
            tokens = two_tokens(Step(), law, drafter, source)
        assert min(chances(tokens, law)) > LEVEL
        firsts.append(tokens[:, 0])
        taken.append(law(()))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pair = counted(torch.stack([firsts[one], firsts[other]], dim=1), 8)
        assert chi_square(pair, torch.outer(taken[one], taken[other])) > LEVEL


@pytest.mark.parametrize("rounds", [5_000, ROUNDS])
@pytest.mark.parametrize("name", POWER["bugs"])
def test_common_mistakes_are_noticed(name: str, rounds: int) -> None:
    p, q = doubles(POWER["p"]), doubles(POWER["q"])
    laws = p, q
    if name == "temperature_forgotten_in_residual":
        laws = warped(p, POWER["temperature"]), warped(q, POWER["temperature"])
    wrong = mistakes((p, q), 0.2)[name]
    assert not torch.allclose(wrong.law(*laws), laws[0], atol=1e-3)

    def result(step: Step) -> float:
        source = torch.Generator().manual_seed(11)
        tokens = one_token(step, laws[0].expand(rounds, -1), laws[1].expand(rounds, -1), source)
        return chi_square(torch.bincount(tokens, minlength=8), laws[0])

    assert result(Step()) > LEVEL
    assert result(wrong) < LEVEL


@pytest.mark.parametrize("name", POWER["bugs"])
def test_common_mistakes_are_noticed_over_two_tokens(name: str) -> None:
    if name == "temperature_forgotten_in_residual":
        target, drafter = SCENES["temperature"]
        wrong = mistakes((SCENES["plain"][0](()), drafter(())), 0.2)[name]
    else:
        target, drafter = SCENES["plain"]
        wrong = mistakes((target(()), drafter(())), 0.2)[name]
    tokens = two_tokens(wrong, target, drafter, torch.Generator().manual_seed(12))
    assert max(chances(tokens, target)) < LEVEL
