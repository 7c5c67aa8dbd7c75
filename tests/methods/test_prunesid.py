"""PruneSID: a hand-made case and what must hold whatever the tokens; no exact vectors can exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning.before_llm.prunesid import group_budgets, mean_similarity, principal_groups, suppress
from mmfast.tokens import VisualTokens


def tokens_of(features: torch.Tensor, attention: torch.Tensor) -> VisualTokens:
    return VisualTokens.from_features(features, patch_features=features, cls_attention=attention)


def test_hand_made_case() -> None:
    """Two groups in turn, each of equal tokens but for one: 4 and 7."""
    features = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])] * 6)
    features[4], features[7] = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])
    attention = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.6, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0])
    rank, survivors = suppress(features, attention, torch.tensor([0, 1] * 6), 0.9)
    # Token 2 suppresses its likes but not 4; token 5 suppresses its likes but not 7; these follow by attention.
    assert survivors.tolist() == [2, 2]
    assert rank.tolist() == [2, 2, 0, 3, 1, 0, 3, 1, 4, 4, 5, 5]
    # One for each group, then by survivors; more than those survive only where the budget asks for it.
    assert group_budgets([6, 6], [2, 2], 4) == [2, 2]
    assert group_budgets([6, 6], [4, 1], 5) == [4, 1]
    assert group_budgets([6, 6], [1, 1], 5) == [3, 2]
    # Caps 5 and 2 hold 7 of 8 and rise by one; the shares are 6 and 0 beside one each, cut to the cap of 6.
    assert group_budgets([40, 3, 0], [40, 2, 0], 8) == [6, 2, 0]


def test_what_survives_is_the_best_of_each_group() -> None:
    generator = torch.Generator().manual_seed(2)
    features, attention = torch.randn(60, 16, generator=generator), torch.rand(60, generator=generator)
    kept = get("prunesid").method(keep=20)(tokens_of(features, attention)).indices
    group = principal_groups(features, 5, seed=0)
    assert group.unique().numel() == 5
    for own in range(5):
        best = attention.masked_fill(group != own, -1).argmax()
        assert bool(torch.isin(best, kept))


def test_groups_follow_the_exact_decomposition() -> None:
    """Six tokens in three groups of very different variance: the exact directions are unmistakable."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(3, 64, generator=generator) * torch.tensor([[2.0], [1.0], [0.5]])
    owner = torch.tensor([2, 0, 1, 1, 0, 2, 0, 0])
    values = sources[owner].sigmoid()
    values = values - values.mean(dim=1, keepdim=True)
    exact = torch.linalg.svd(values, full_matrices=False).U[:, :3].abs().argmax(dim=1)
    for seed in range(3):
        assert principal_groups(sources[owner], 3, seed).equal(exact)
    assert exact.equal(owner)


def test_mean_similarity_is_that_of_all_pairs() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=-1)
    pairs = torch.triu_indices(9, 9, offset=1)
    assert mean_similarity(features) == pytest.approx(float((unit @ unit.T)[pairs[0], pairs[1]].mean()), abs=1e-6)


@settings(deadline=None)
@given(
    total=st.integers(1, 40),
    groups=st.integers(1, 5),
    limit=st.floats(-1, 2),
    seed=st.integers(0, 9),
)
def test_suppression_is_the_greedy_one(total: int, groups: int, limit: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, attention = torch.randn(total, 3, generator=generator), torch.rand(total, generator=generator)
    group = torch.randint(0, groups, (total,), generator=generator)
    rank, survivors = suppress(features, attention, group, limit)
    unit = torch.nn.functional.normalize(features, dim=-1)
    for own in range(int(group.max()) + 1):
        members = [i for i in attention.argsort(descending=True).tolist() if group[i] == own]
        best: list[int] = []
        for member in members:
            if all(float(torch.linalg.vecdot(unit[member], unit[other])) <= limit for other in best):
                best.append(member)
        expected = best + [member for member in members if member not in best]
        assert int(survivors[own]) == len(best)
        assert [int(rank[member]) for member in expected] == list(range(len(expected)))


@given(data=st.data(), kept=st.integers(1, 200))
def test_budgets_add_up(data: st.DataObject, kept: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=max(1, kept // 4)))
    if sum(sizes) < kept:
        sizes[0] += kept - sum(sizes)
    survivors = [data.draw(st.integers(1, size)) if size else 0 for size in sizes]
    budget = group_budgets(sizes, survivors, kept)
    assert sum(budget) == kept
    assert all(min(1, size) <= part <= size for part, size in zip(budget, sizes, strict=True))


@settings(deadline=None)
@given(total=st.integers(2, 60), width=st.integers(1, 12), kept=st.integers(1, 59), flat=st.booleans())
def test_exactly_keep_survive(total: int, width: int, kept: int, flat: bool) -> None:
    """Also where all tokens are equal, nothing is looked at, or directions are more than channels."""
    generator = torch.Generator().manual_seed(total)
    features = torch.ones(total, width) if flat else torch.randn(total, width, generator=generator)
    attention = torch.zeros(total) if flat else torch.rand(total, generator=generator)
    decision = get("prunesid").method(keep=kept)(tokens_of(features, attention))
    if kept >= total:
        assert decision is None
    else:
        assert len(decision) == kept


def test_the_seed_decides_and_global_state_does_not() -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = tokens_of(torch.randn(150, 40, generator=generator), torch.rand(150, generator=generator))
    method = get("prunesid").method(keep=60)
    first = method(tokens).indices
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert method(tokens).indices.equal(first)
    assert torch.get_rng_state().equal(state)
