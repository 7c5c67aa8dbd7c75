"""The model drafts on a copy of its cache with few visual tokens."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.adapters import binding
from mmfast.adapters.self_draft import SelfDraft
from mmfast.registry import get
from mmfast.speculative.drafters.pruned_self import PrunedSelf, best_speedup, evenly, kept_tokens, select
from support.against_plain import check, decoded, rounds_when_right, unsaid
from support.cases import case_id, mixed, one, text_only, two
from support.checks import census, registries
from support.families import FAMILIES, Batch, Family

pytestmark = pytest.mark.filterwarnings("ignore:method 'pruned_self'")

CHOSEN = [FAMILIES[name] for name in ("llava", "qwen2_5_vl", "gemma3", "internvl")]
SOME = "pruned_self(adaptive_length=False, num_draft=4, keep=0.4)"
ALL = "pruned_self(adaptive_length=False, num_draft=4, keep=1.0)"


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_same_tokens(family: Family, case: Any) -> None:
    assert check(case(family), SOME).drafted > 0


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_a_copy_of_everything_is_always_right(family: Family, case: Any) -> None:
    """Also after many rounds: what the model stores of the answer has come into the copy, row by row."""
    record = check(case(family), ALL, **unsaid(family.model()))
    assert record.accepted == record.drafted > 0
    assert record.rounds == rounds_when_right(4, len(case(family)))


@pytest.mark.parametrize(
    "beside", ["divprune(keep=5)", "fastv(layer=1, keep=3)", "snapkv(keep=8)", "adakv(keep=8)", "quest()"]
)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_beside_other_methods(family: Family, beside: str) -> None:
    check(mixed(family), SOME, beside=beside)
    if beside != "quest()":
        record = check(mixed(family), ALL, beside=beside, **unsaid(family.model()))
        assert record.rounds == rounds_when_right(4, 3)


@pytest.mark.parametrize("family", CHOSEN[:2], ids=case_id)
def test_beside_packing(family: Family) -> None:
    """The copy holds what packing gives back of the prompt; what is packed of the answer later stays whole in it."""
    record = check(one(family), ALL, beside="kivi(residual=8, group=8)", **unsaid(family.model()))
    assert record.hit[0] >= 0.8 * record.tried[0] > 0


@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_skipping_as_well(family: Family) -> None:
    check(mixed(family), "pruned_self(adaptive_length=False, keep=0.5, selection='uniform', skip_ratio=0.3)")


@pytest.mark.parametrize("num_draft", [1, 7])
def test_long_ragged_answers(num_draft: int) -> None:
    """Holes are closed in both caches along the way."""
    family = FAMILIES["llava"]
    check(mixed(family), f"pruned_self(adaptive_length=False, keep=0.5, num_draft={num_draft})", steps=110)


def test_sampling_gives_what_it_gives_without_drafts() -> None:
    batch = mixed(FAMILIES["qwen2_5_vl"])
    model = batch.family.model()
    torch.manual_seed(3)
    expected = decoded(model, batch, do_sample=True)
    with mmfast.accelerate(model, SOME):
        torch.manual_seed(3)
        assert torch.equal(decoded(model, batch, do_sample=True), expected)


# ------------------------------------------------------------------------------------ the copy


@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_the_copy_holds_all_text_and_what_was_kept(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, copies = mixed(family), []
    part = SelfDraft.part

    def noted(self: SelfDraft, kept: list[Tensor]) -> SelfDraft:
        found = part(self, kept)
        copies.append((self.visual(), kept, found.rounds.cache, self.rounds.cache))
        for own, other in zip(found.rounds.cache.layers, self.rounds.cache.layers, strict=True):
            for row in range(len(batch)):
                mine, all_of_them = own.real_entries()[row, 0], other.real_entries()[row, 0]
                places = other.slots[row][all_of_them].tolist()
                gone = set(self.visual()[row].tolist()) - set(self.visual()[row][kept[row]].tolist())
                assert own.slots[row][mine].tolist() == [place for place in places if place not in gone]
                stays = torch.tensor([place not in gone for place in places])
                assert torch.equal(own.keys[row][:, mine], other.keys[row][:, all_of_them][:, stays])
        return found

    monkeypatch.setattr(SelfDraft, "part", noted)
    with mmfast.accelerate(family.model(), SOME):
        decoded(family.model(), batch)
    ((visual, kept, _, _),) = copies
    counts = [sum(token in (120, 121) for token in row) for row in batch.ids]
    assert [len(places) for places in visual] == counts
    assert [len(places) for places in kept] == [kept_tokens(0.4, count) if count else 0 for count in counts]


def attention_of(batch: Batch) -> Tensor:
    """Attention of all layers for one unpadded prompt, ``[L, H, S, S]``."""
    with torch.no_grad():
        output = batch.family.model("eager")(**batch.inputs, output_attentions=True)
    return torch.stack([layer[0] for layer in output.attentions]).float()


@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_scores_are_the_attention_of_the_text_behind_the_images(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, scores = mixed(family), []
    monkeypatch.setattr(PrunedSelf, "_warn", lambda self, model, part, request: scores.extend(model.scores()))
    with mmfast.accelerate(family.model(), SOME):
        decoded(family.model(), batch, steps=3)
    assert len(scores) == 3
    for row in range(2):
        alone = batch.alone(row)
        visual = torch.tensor([token in (120, 121) for token in alone.ids[0]]).nonzero().squeeze(-1)
        wanted = attention_of(alone)[:, :, int(visual[-1]) + 1 :, visual].mean(dim=(0, 1, 2))
        assert torch.allclose(scores[row], wanted, atol=1e-5)
    assert len(scores[2]) == 0


def test_a_prompt_that_ends_with_an_image() -> None:
    family = FAMILIES["llava"]
    check(family.batch([3, family.image()], [2, family.image(0, 1), 1]), SOME)


def test_evenly_chosen_tokens_need_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(binding, "register_tap", lambda implementation, ledger: asked.append(implementation))
    family = FAMILIES["llava"]
    with mmfast.accelerate(family.model(), "pruned_self(selection='uniform')"):
        assert not asked
    with mmfast.accelerate(family.model(), "pruned_self()"):
        assert asked == ["sdpa"]


def test_nothing_is_left() -> None:
    family = FAMILIES["qwen2_5_vl"]
    before, tables = census(family.model()), registries()
    check(two(family), "pruned_self(adaptive_length=False, skip_ratio=0.3)")
    assert census(family.model()) == before
    assert registries() == tables


# ----------------------------------------------------------------------------------- the choice


def test_the_first_stage_takes_the_fewest_that_reach_the_share() -> None:
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert select(scores, 4, 0.39).attended.tolist() == [1]
    assert select(scores, 4, 0.41).attended.tolist() == [1, 2]
    assert select(scores, 1, 1.0).attended.tolist() == [1]
    assert select(scores, 4, 1.0).indices.tolist() == [0, 1, 2, 3]


def test_ties_go_to_the_earlier_token() -> None:
    assert select(torch.ones(5), 2, 0.4).attended.tolist() == [0, 1]
    assert select(torch.zeros(5), 3, 0.4).indices.tolist() == [0, 1, 4]


def test_counts() -> None:
    assert kept_tokens(1 - 0.9, 10) == 1, "0.09999999999999998 of 10 is one"
    assert kept_tokens(0.1, 9) == 1, "at least one"
    assert kept_tokens(5, 3) == 3
    assert evenly(0, 4).tolist() == []
    assert evenly(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0 must be"),
        ({"keep": 1.2}, "keep=1.2 must"),
        ({"percentage": 2}, "percentage=2 must be"),
        ({"num_draft": 0}, "num_draft=0 must be"),
        ({"threshold": -1}, "threshold=-1 must be"),
        ({"skip_ratio": 1}, "skip_ratio=1 must be"),
        ({"selection": "random"}, "selection='random' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("pruned_self").method(**options)


@pytest.mark.filterwarnings("default:method 'pruned_self'")
def test_what_cannot_pay_is_warned_about_once() -> None:
    family = FAMILIES["llava"]
    assert best_speedup(5, 1.0) == 1.0
    with mmfast.accelerate(family.model(), "pruned_self()"):
        with pytest.warns(UserWarning, match="times as fast at best; set skip_ratio"):
            decoded(family.model(), one(family))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decoded(family.model(), one(family))
