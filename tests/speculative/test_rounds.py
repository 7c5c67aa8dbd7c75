"""What drafters are told of a prompt and of each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import mmfast
from mmfast.registry import register, unregister
from mmfast.speculative.base import Draft, Drafter, Request, Session, Verified
from support.cases import case_id, mixed, two
from support.families import FAMILIES, Family

REQUESTS: list[Request] = []
ROUNDS: list[Mapping[int, Verified]] = []


class Listening(Session):
    """Draft two zeros and listen."""

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        return {row: Draft((2, 3)[: budget[row]], (0, 0)[: budget[row]]) for row in roots}

    def observe(self, verified: Mapping[int, Verified]) -> None:
        ROUNDS.append(verified)


@pytest.fixture(autouse=True)
def listener() -> Any:
    @register("listener", stage="decode")
    @dataclass(frozen=True)
    class Listener(Drafter):
        """Listen."""

        trees: ClassVar[bool] = True
        needs_hidden: ClassVar[bool] = True

        @property
        def most(self) -> int:
            return 2

        def start(self, request: Request) -> Session:
            REQUESTS.append(request)
            return Listening()

    REQUESTS.clear()
    ROUNDS.clear()
    yield
    unregister("listener")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
@pytest.mark.parametrize("case", [two, mixed], ids=case_id)
def test_prompt_is_described_row_by_row(family: Family, case: Any) -> None:
    model, batch = family.model(), case(family)
    with torch.no_grad():
        output = model(**batch.inputs, output_hidden_states=True)
    with mmfast.accelerate(model, "listener(adaptive_length=False)"):
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    (request,) = REQUESTS
    valid = batch.inputs["attention_mask"].bool()
    placeholders = torch.tensor([model.config.image_token_id])
    for row, prompt in enumerate(request.prefill):
        ids = batch.inputs["input_ids"][row, valid[row]]
        assert torch.equal(prompt.ids, ids)
        assert list(request.prompts[row]) == ids.tolist()
        assert torch.equal(prompt.visual, torch.isin(ids, placeholders))
        assert torch.equal(prompt.visual, prompt.media >= 0)
        # Some families count every tile of a picture.
        assert int(prompt.media.max()) + 1 >= len(batch.media[row])
        torch.testing.assert_close(prompt.hidden, output.hidden_states[-1][row, valid[row]], atol=2e-5, rtol=0)
        torch.testing.assert_close(prompt.embeds, output.hidden_states[0][row, valid[row]], atol=1e-5, rtol=0)
        assert prompt.positions.shape[-1] == len(ids)
        assert request.first[row] == int(output.logits[row, -1].argmax())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("plan", ["divprune(keep=0.4)", "fastv(layer=1, keep=0.4)"])
def test_what_was_pruned_is_not_described(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, f"{plan} + listener(adaptive_length=False)") as fast:
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        report = fast.report()
    (request,) = REQUESTS
    for row, prompt in enumerate(request.prefill):
        left = sum(item.left for item in report.media if item.row == row)
        assert int(prompt.visual.sum()) == left
        assert len(prompt.ids) == left + report.text_tokens[row]
        assert prompt.hidden.shape == prompt.embeds.shape == (len(prompt.ids), model.config.text_config.hidden_size)
        head = model.get_output_embeddings()
        assert int(head(prompt.hidden[-1]).argmax()) == request.first[row]
        text = ~prompt.visual
        torch.testing.assert_close(prompt.embeds[text], model.get_input_embeddings()(prompt.ids[text]))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_rounds_tell_of_every_node(name: str) -> None:
    """Logits and hidden states belong to the nodes they are given with, in rows of different length."""
    family = FAMILIES[name]
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, "listener(adaptive_length=False)"):
        output = model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
    head = model.get_output_embeddings()
    answers: dict[int, list[int]] = {row: [first] for row, first in enumerate(REQUESTS[0].first)}
    for verified in ROUNDS:
        for row, seen in verified.items():
            nodes = len(seen.tokens)
            assert seen.tokens[0] == answers[row][-1]
            assert seen.logits.shape[0] == nodes == len(seen.parents)
            assert seen.hidden is not None
            torch.testing.assert_close(head(seen.hidden), seen.logits, atol=1e-5, rtol=0)
            assert seen.emitted[-1] == int(seen.logits[seen.path[-1]].argmax())
            answers[row] += seen.emitted
    for row, answer in answers.items():
        assert answer == output[row, batch.inputs["input_ids"].shape[1] :].tolist()
