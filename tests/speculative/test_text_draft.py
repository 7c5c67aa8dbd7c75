"""A language model drafts from the text alone; and how second models draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mmfast
from mmfast.adapters.companion import TextReading
from mmfast.speculative.base import Request, Verified
from mmfast.speculative.drafters.assistant import CompanionSession
from mmfast.speculative.verify import draw, reject
from support.acceptance import chi_square
from support.against_plain import check, decoded, rounds_when_right, unsaid
from support.cases import case_id, mixed, one, text_only
from support.companions import CHOSEN, language_model
from support.families import FAMILIES, Family
from support.prompts import VOCABULARY

TEXT = "text_draft(adaptive_length=False, num_draft=4)"


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_text_drafts_change_nothing(family: Family, case: Any) -> None:
    assert check(case(family), TEXT, draft_model=language_model()).drafted > 0


def test_the_language_model_of_a_model_is_right_about_text() -> None:
    """LLaVA's language model, given as one that sees no images, is always right where there are none."""
    family = FAMILIES["llava"]
    model = family.model()
    alone = transformers.LlamaForCausalLM(model.config.text_config).eval()
    alone.model.load_state_dict(model.get_decoder().state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    record = check(text_only(family), TEXT, draft_model=alone, **unsaid(model))
    assert record.acceptance_rate == 1.0
    assert record.rounds == rounds_when_right(4, 2)
    assert check(one(family), TEXT, draft_model=alone).acceptance_rate < 0.9


@pytest.mark.parametrize("window", [3, 5])
def test_windows_can_go_back(window: int) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        initializer_range=0.3,
    )
    model = transformers.MistralForCausalLM(config).eval()
    reading = TextReading(model, [[]], VOCABULARY)
    reading.extend({0: list(range(20, 30))})
    reading.settle({0: 10})
    reading.extend({0: [31, 32, 33, 34]})
    reading.settle({0: 1})
    found = reading.extend({0: [40]})
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[*range(20, 30), 31, 40]])).logits[:, -1]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_text_prompts_have_no_placeholders() -> None:
    family, seen = FAMILIES["qwen2_5_vl"], []
    model = language_model(VOCABULARY - 8)
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    batch = mixed(family)
    check(batch, TEXT, draft_model=model, **unsaid(family.model()))
    handle.remove()
    for row, ids in enumerate(seen[:3]):
        assert ids[0, :-1].tolist() == [token for token in batch.ids[row] if 0 < token < 120]


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 10, VOCABULARY + 10])
@pytest.mark.parametrize("sampling", [False, True])
def test_padded_vocabularies(vocabulary: int, sampling: bool) -> None:
    """Answers hold tokens that the drafter does not know, and it knows tokens that no answer holds."""
    family = FAMILIES["llava"]
    if not sampling:
        check(mixed(family), TEXT, draft_model=language_model(vocabulary), steps=40)
        return
    with mmfast.accelerate(family.model(), TEXT, draft_model=language_model(vocabulary)) as fast:
        torch.manual_seed(1)
        decoded(family.model(), mixed(family), do_sample=True, steps=40)
        assert fast.report().drafting.drafted > 0


# -------------------------------------------------------------------------------------- sampling


class Table:
    """A second model that looks at the last token only."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.vocabulary = table.shape[1]
        self.unread = [()]
        self.given: list[int] = []
        self._settled = 0

    def read(self, request: Request) -> Table:
        return self

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        self.given += tokens[0]
        return self.table[self.given[-1]][None]

    def settle(self, kept: Mapping[int, int]) -> None:
        self._settled += kept.get(0, 0)
        del self.given[self._settled :]

    def close(self) -> None:
        pass


def test_sampled_answers_have_the_law_of_the_model() -> None:
    """Two tokens and the draft's own catching up, on a vocabulary of which the drafter lacks a token."""
    chance = torch.Generator().manual_seed(11)
    vocabulary, banned, temperature, count = 6, 4, 0.7, 4000
    target = (2 * torch.randn(vocabulary, vocabulary, generator=chance)).softmax(dim=-1)
    table = 2 * torch.randn(vocabulary, vocabulary - 1, generator=chance)

    def law(row: int, drafted: Sequence[int], logits: Tensor) -> Tensor:
        logits = logits / temperature
        logits[banned] = -torch.inf
        return logits.softmax(dim=-1)

    def law_of(root: int, tokens: Sequence[int]) -> Tensor:
        return target[tokens[-1] if tokens else root]

    def uniform() -> float:
        return float(torch.rand((), generator=chance))

    counts = torch.zeros(vocabulary, vocabulary)
    accepted = 0
    for _ in range(count):
        model = Table(table)
        request = SimpleNamespace(
            companion=model,
            vocabulary=vocabulary,
            first=(0,),
            sampling=True,
            law=law,
            generator=[chance],
            stop=frozenset(),
            excluded=frozenset({banned}),
            device=torch.device("cpu"),
        )
        session: Any = CompanionSession(request, depth=3, risk=1.0)  # type: ignore[arg-type]
        answer = [0]
        while len(answer) < 3:
            root = answer[-1]
            draft = session.propose({0: root}, {0: 3})[0]
            assert banned not in draft.tokens
            assert draft.laws.shape == (3, vocabulary)
            assert model.given == [*answer, *draft.tokens[:-1]]
            found = reject(draft, lambda _, tokens, root=root: law_of(root, tokens), uniform)
            emitted = (*(draft.tokens[node - 1] for node in found.path[1:]), found.token)
            accepted += len(found.path) - 1
            answer += emitted
            if vocabulary - 1 in emitted:
                # The drafter does not know it, and is silent from now on.
                while len(answer) < 3:
                    answer.append(draw(target[answer[-1]], uniform()))
                break
            session.observe({0: Verified((root, *draft.tokens), draft.tree(), found.path, emitted, torch.empty(0))})
        counts[answer[1], answer[2]] += 1
    assert accepted > 0.3 * count
    assert chi_square(counts.flatten(), (target[0][:, None] * target).flatten()) > 1e-4


def test_a_drafter_is_silent_after_a_token_it_does_not_know() -> None:
    model = Table(torch.zeros(3, 3))
    request: Any = SimpleNamespace(
        companion=model, vocabulary=5, first=(0,), sampling=False, stop=frozenset(), excluded=frozenset()
    )
    session = CompanionSession(request, depth=2, risk=1.0)
    assert session.propose({0: 0}, {0: 2})[0].tokens == (0, 0)
    session.observe({0: Verified((0, 0, 0), (-1, 0, 1), (0,), (4,), torch.empty(0))})
    assert session.propose({0: 4}, {0: 2})[0].tokens == ()
    unknown: Any = SimpleNamespace(**{**vars(request), "first": (4,)})
    assert CompanionSession(unknown, depth=2, risk=1.0).propose({0: 4}, {0: 2})[0].tokens == ()


def test_drafts_end_with_what_is_unsure_and_with_the_answer() -> None:
    table = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [0.5, 0.0, 0.0]])
    request: Any = SimpleNamespace(
        companion=Table(table), vocabulary=3, first=(0,), sampling=False, stop=frozenset(), excluded=frozenset()
    )
    assert CompanionSession(request, depth=9, risk=0.4).propose({0: 0}, {0: 9})[0].tokens == (1, 2, 0)
    ending: Any = SimpleNamespace(**{**vars(request), "companion": Table(table), "stop": frozenset({2})})
    assert CompanionSession(ending, depth=9, risk=0.4).propose({0: 0}, {0: 9})[0].tokens == (1, 2)
    short: Any = SimpleNamespace(**{**vars(request), "companion": Table(table)})
    assert CompanionSession(short, depth=9, risk=0.4).propose({0: 0}, {0: 1})[0].tokens == (1,)
