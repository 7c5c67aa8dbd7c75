"""SWIFT: the model drafts with sublayers left out, in its own cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import mmfast
from mmfast.adapters.self_draft import SelfDraft
from mmfast.decoding import Drafting
from mmfast.registry import get
from mmfast.speculative.drafters.swift import candidate_widths
from mmfast.speculative.skipping import Skips, SkipSearch, initial_skips, searched_sublayers
from support.against_plain import check, decoded, rounds_when_right, unsaid
from support.cases import case_id, mixed, one, text_only
from support.checks import census
from support.families import FAMILIES, Family

pytestmark = pytest.mark.filterwarnings("ignore:method 'swift'")

CHOSEN = [FAMILIES[name] for name in ("llava", "qwen2_5_vl", "gemma3", "internvl")]
EAGER = "swift(adaptive_length=False, num_draft=4, threshold=0.02, context_window=5)"
NOTHING_LEFT_OUT = "swift(adaptive_length=False, num_draft=4, threshold=0.0, skip_ratio=0.0)"


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_same_tokens(family: Family, case: Any) -> None:
    record = check(case(family), EAGER)
    assert record.drafted > record.rounds


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_a_model_without_gaps_is_always_right(family: Family, case: Any) -> None:
    """Drafts are then what the model says itself: a wrong position, mask or cache would show."""
    batch = case(family)
    record = check(batch, NOTHING_LEFT_OUT, **unsaid(family.model()))
    assert record.accepted == record.drafted > 0
    assert record.rounds == rounds_when_right(4, len(batch))


@pytest.mark.parametrize("beside", ["divprune(keep=5)", "fastv(layer=1, keep=3)", "snapkv(keep=8)", "adakv(keep=8)"])
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_beside_other_methods(family: Family, beside: str) -> None:
    check(mixed(family), EAGER, beside=beside)
    record = check(mixed(family), NOTHING_LEFT_OUT, beside=beside, **unsaid(family.model()))
    assert record.rounds == rounds_when_right(4, 3)


@pytest.mark.parametrize("beside", ["kivi(residual=8, group=8)", "quest()"])
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_beside_packing_and_retrieval(family: Family, beside: str) -> None:
    """What is packed while a draft is written could not be taken back."""
    check(mixed(family), EAGER, beside=beside)
    record = check(one(family), NOTHING_LEFT_OUT, beside=beside, **unsaid(family.model()))
    assert record.accepted == record.drafted > 0


@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_combs(family: Family) -> None:
    chain = check(mixed(family), "swift(adaptive_length=False, num_draft=3, threshold=0.0)")
    comb = check(mixed(family), "swift(adaptive_length=False, num_draft=3, threshold=0.0, tree=True)")
    assert comb.accepted > chain.accepted
    assert comb.drafted > 3 * comb.rounds


def test_sampling_gives_what_it_gives_without_drafts() -> None:
    batch = mixed(FAMILIES["llava"])
    model = batch.family.model()
    torch.manual_seed(3)
    expected = decoded(model, batch, do_sample=True, temperature=0.6)
    with mmfast.accelerate(model, EAGER):
        torch.manual_seed(3)
        assert torch.equal(decoded(model, batch, do_sample=True, temperature=0.6), expected)


# ---------------------------------------------------------------------------- what is left behind


@contextmanager
def breaking(module: torch.nn.Module, call: int) -> Iterator[list[int]]:
    """Let a module fail when it is called for the given time."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("broken")

    handle = module.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("call", [2, 3, 5])
@pytest.mark.parametrize("family", CHOSEN[:2], ids=case_id)
def test_nothing_is_left_after_a_draft_breaks_off(family: Family, call: int) -> None:
    model, batch = family.model(), one(family)
    before = census(model)
    expected = decoded(model, batch)
    with mmfast.accelerate(model, "swift(adaptive_length=False, num_draft=8, threshold=0.0)") as fast:
        at_work = census(model)
        with breaking(model.get_decoder().layers[2], call), pytest.raises(RuntimeError, match="broken"):
            decoded(model, batch)
        assert census(model) == at_work
        assert torch.equal(decoded(model, batch), expected)
        fast.remove()
    assert census(model) == before


def books(cache: Any) -> list[dict[str, Any]]:
    """Copy all a cache holds."""
    names = ("seen", "history", "floor", "holes", "renumbered", "keys", "values", "slots", "valid", "heads", "places")
    found = []
    for layer in cache.layers:
        own = {name: getattr(layer, name) for name in names}
        found.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.items()})
    return found


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for layer, other in zip(first, second, strict=True)
        for name, value in layer.items()
    )


@pytest.mark.parametrize("beside", ["", "fastv(layer=1, keep=3) + ", "adakv(keep=8) + "])
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_the_cache_is_as_it_was(family: Family, beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every draft and every trial, also of layers that were left out and of rows that have ended."""
    drafting, seen = SelfDraft.drafting, []

    @contextmanager
    def compared(self: SelfDraft, *skips: Any) -> Iterator[None]:
        before = books(self.rounds.cache)
        with drafting(self, *skips):
            yield
            between = books(self.rounds.cache)
        assert not same(before, between)
        assert same(before, books(self.rounds.cache))
        seen.append(skips)

    monkeypatch.setattr(SelfDraft, "drafting", compared)
    with mmfast.accelerate(family.model(), beside + EAGER):
        decoded(family.model(), mixed(family))
    assert len(seen) > 10


def test_draft_steps_are_no_steps_of_the_answer() -> None:
    family = FAMILIES["llava"]
    with mmfast.accelerate(family.model(), NOTHING_LEFT_OUT) as fast:
        decoded(family.model(), one(family), **unsaid(family.model()))
        assert fast.report().decode_steps == rounds_when_right(4)


# ------------------------------------------------------------------------------------ the search


def test_layers_that_have_to_run_are_never_left_out() -> None:
    assert initial_skips(8, fixed=(0, 3, 7)) == Skips((1, 5), (1, 5))
    search = SkipSearch(8, (0, 3, 7), searched_sublayers(8, 0.5), trials=60)
    while not search.ended:
        left_out = search.trial.attention + search.trial.feed_forward
        assert not set(left_out) & {0, 3, 7}
        search.tell(0.1)
        assert len(search.trial.attention + search.trial.feed_forward) == 6


def test_the_search_keeps_the_best_and_ends() -> None:
    search = SkipSearch(12, (), 9, patience=7, trials=100, enough=0.9)
    assert search.trial == search.best == initial_skips(12)
    search.tell(0.3)
    first = search.best
    better = search.trial
    search.tell(0.6)
    assert search.best == better != first
    search.tell(0.6)
    assert search.best == better, "as good is not better"
    for _ in range(6):
        assert not search.ended
        search.tell(0.5)
    assert search.ended, "patience"
    good = SkipSearch(12, (), 9, enough=0.9)
    good.tell(0.9)
    assert not good.ended
    good.tell(0.95)
    assert good.ended
    short = SkipSearch(12, (), 9, trials=2)
    short.tell(0.1)
    assert not short.ended
    short.tell(0.1)
    assert short.ended


def test_suggestions_find_better_sets_than_chance() -> None:
    """What a set is worth is known without noise here, and one suggestion in two rests on what is known."""

    def found(interval: int, seed: int) -> float:
        harm = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)) ** 3
        search = SkipSearch(20, (), 12, bayes_interval=interval, trials=80, enough=2.0, seed=seed)
        while not search.ended:
            skips = search.trial
            search.tell(
                float(torch.exp(-harm[0, list(skips.attention)].sum() - harm[1, list(skips.feed_forward)].sum()))
            )
        return search.score

    seeds = range(6)
    assert sum(found(2, seed) for seed in seeds) > 1.1 * sum(found(0, seed) for seed in seeds)


def test_a_trial_is_the_share_of_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read anew from the prompt without gaps, an answer comes out the same, in ragged rows too."""
    scores: list[float] = []
    monkeypatch.setattr(SkipSearch, "tell", lambda self, score: scores.append(score))
    monkeypatch.setattr(SkipSearch, "ended", property(lambda self: False))
    for family in CHOSEN:
        with mmfast.accelerate(
            family.model(), "swift(adaptive_length=False, skip_ratio=0.0, context_window=6, num_draft=2)"
        ):
            decoded(family.model(), mixed(family))
    assert len(scores) > 20
    assert set(scores) == {1.0}


def test_the_best_set_is_remembered() -> None:
    family = FAMILIES["llava"]
    told: list[float] = []
    with mmfast.accelerate(family.model(), "swift(context_window=4, trials=5, adaptive_length=False)") as fast:
        drafting = fast._binding.loop
        decoded(family.model(), one(family))
        search = drafting.memory["skips"]
        told.append(search.score)
        decoded(family.model(), one(family))
        assert drafting.memory["skips"] is search
    assert search.ended
    assert told[0] >= 0


def test_the_search_can_be_left_out() -> None:
    family = FAMILIES["llava"]
    with mmfast.accelerate(family.model(), "swift(search=False, context_window=2, adaptive_length=False)") as fast:
        decoded(family.model(), one(family))
        assert fast._binding.loop.memory["skips"].score < 0


# ------------------------------------------------------------------------------------- options


def test_widths_at_the_bounds() -> None:
    assert candidate_widths([0.95, 0.8, 0.5]) == [5, 8, 10]
    assert candidate_widths([0.951, 0.801, 0.501, 0.0], "sampling") == [1, 3, 5, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft": 0}, "num_draft=0 must be"),
        ({"threshold": 1.5}, "threshold=1.5 must be"),
        ({"skip_ratio": 1.0}, "skip_ratio=1.0 must be"),
        ({"skip_ratio": -0.1}, "skip_ratio=-0.1 must be"),
        ({"context_window": 0}, "context_window=0 must be"),
        ({"bayes_interval": -1}, "bayes_interval=-1 must be"),
        ({"patience": True}, "patience=True must be"),
        ({"trials": 0}, "trials=0 must be"),
        ({"enough": "much"}, "enough='much' must be"),
        ({"tree": "comb"}, "tree='comb' must be"),
        ({"search": None}, "search=None must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("swift").method(**options)


def test_only_combs_are_trees() -> None:
    assert not get("swift").method().trees
    assert get("swift").method(tree=True).trees
    assert get("swift").method(tree=True).most > get("swift").method().most == 25


@pytest.mark.filterwarnings("default:method 'swift'")
def test_models_of_few_layers_are_warned_about() -> None:
    family = FAMILIES["llava"]
    with (
        pytest.warns(UserWarning, match="method 'swift': leaving layers out hardly pays"),
        mmfast.accelerate(family.model(), "swift()"),
    ):
        pass


def test_the_report_counts_drafts() -> None:
    record = check(one(FAMILIES["llava"]), "swift(adaptive_length=False, num_draft=2, threshold=0.0)")
    assert isinstance(record, Drafting)
    assert max(len(record.tried), len(record.hit)) <= 2
