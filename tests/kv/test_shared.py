"""Many questions on one prompt are answered as each would be alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmfast
from support.cases import case_id, one
from support.checks import CLOSE, census, generate, registries
from support.families import FAMILIES, Family
from support.prompts import padded, text

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
PLANS = [
    "full",
    "divprune(keep=0.4)",
    "pyramiddrop(keep=0.4)",
    "knorm(keep=0.4)",
    "razor_attention(keep=0.4)",
    "divprune(keep=0.6) + snapkv(keep=0.5, window=4) + calibquant()",
]
QUESTIONS = [text(3, 11), text(6, 12), text(1, 13), text(4, 14)]
STEPS = 5


def alone(family: Family, plan: str, question: list[int], steps: int = STEPS) -> list[int]:
    """Answer one question after the prompt on a cache of its own."""
    model, batch = family.model(), one(family)
    ids = batch.inputs["input_ids"]
    with mmfast.accelerate(model, plan), torch.no_grad():
        cache = model(**batch.inputs, use_cache=True).past_key_values
        whole = torch.cat([ids, torch.tensor([question])], dim=1)
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "past_key_values": cache}
        return generate(model, inputs, steps).tokens[0].tolist()


@EVERY
@pytest.mark.parametrize("plan", PLANS)
def test_answers_equal_those_of_separate_runs(family: Family, plan: str) -> None:
    model = family.model()
    stock, tables = census(model), registries()
    context = mmfast.SharedContext(model, one(family).inputs, plan)
    answers = context.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[])
    assert answers == [alone(family, plan, question) for question in QUESTIONS]
    assert census(model) == stock
    assert registries() == tables


def test_an_answer_ends_at_its_end_token() -> None:
    context = mmfast.SharedContext(FAMILIES["llava"].model(), one(FAMILIES["llava"]).inputs)
    whole = context.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[])
    end = whole[1][2]
    for answer, full in zip(context.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=end), whole, strict=True):
        assert answer == (full[: full.index(end) + 1] if end in full else full)


@pytest.mark.parametrize("plan", ["full", "razor_attention(keep=0.4)", "divprune(keep=0.5) + calibquant()"])
def test_a_context_is_kept_on_disk(plan: str, tmp_path: Path) -> None:
    family = FAMILIES["gemma3"]
    model, inputs = family.model(), one(family).inputs
    context = mmfast.SharedContext.cached(model, inputs, tmp_path, plan)
    (path,) = tmp_path.iterdir()
    assert path.stem == context.key
    again = mmfast.SharedContext.cached(model, inputs, tmp_path, plan)
    assert "loaded" in again.report.note
    assert again.kv_bytes == context.kv_bytes
    assert again.ask(QUESTIONS, max_new_tokens=3) == context.ask(QUESTIONS, max_new_tokens=3)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1e-3}
    assert mmfast.SharedContext.cached(model, other, tmp_path, plan).key != context.key
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_other_models_and_other_files_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model, path = family.model(), tmp_path / "context.safetensors"
    mmfast.SharedContext(model, one(family).inputs).save(path)
    with pytest.raises(ValueError, match="was made by a model of other weights or configuration"):
        mmfast.SharedContext.load(path, FAMILIES["vipllava"].model())
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken.safetensors' cannot be read"):
        mmfast.SharedContext.load(tmp_path / "broken.safetensors", model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mmfast.SharedContext.load(tmp_path / "nothing.safetensors", model)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        mmfast.SharedContext(model, one(family).inputs).save(tmp_path / "context.bin")


@pytest.mark.parametrize("plan", ["h2o(keep=0.4)", "quest(keep=0.4)"])
def test_plans_that_act_at_every_step_are_refused(plan: str) -> None:
    with pytest.raises(ValueError, match="acts at every decode step"):
        mmfast.SharedContext(FAMILIES["llava"].model(), one(FAMILIES["llava"]).inputs, plan)


def test_senseless_questions_are_refused() -> None:
    family = FAMILIES["llava"]
    context = mmfast.SharedContext(family.model(), one(family).inputs)
    for questions in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one question"):
            context.ask(questions)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        context.ask([[1]], max_new_tokens=0)
    two = family.batch([1, family.image()], [2, family.image()])
    with pytest.raises(ValueError, match="hold 2 prompts"):
        mmfast.SharedContext(family.model(), two.inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_refused(side: str) -> None:
    """It would be read as part of the prompt."""
    family = FAMILIES["llava"]
    with pytest.raises(ValueError, match=r"attention_mask calls 2 of \d+ tokens padding, .* without padding"):
        mmfast.SharedContext(family.model(), padded(one(family).inputs, side))


def test_logits_are_exact() -> None:
    """What the shared attention gives is what one attention over everything gives."""
    from mmfast.kernels.shared_prefix import shared_prefix

    generator = torch.Generator().manual_seed(0)
    query, prefix = torch.randn(3, 4, 2, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    suffix = torch.randn(2, 3, 2, 5, 8, generator=generator)
    visible = torch.rand(3, 2, 5, generator=generator) > 0.3
    real, bias = torch.rand(2, 9, generator=generator) > 0.3, torch.randn(2, 9, generator=generator)
    found, _ = shared_prefix(
        query, (prefix[0], prefix[1]), (suffix[0], suffix[1]), visible, prefix_visible=real, prefix_bias=bias
    )
    for row in range(3):
        for head in range(4):
            keys, values = (torch.cat([prefix[i][head // 2], suffix[i][row, head // 2]]) for i in range(2))
            logits = query[row, head] @ keys.T * 8**-0.5
            logits[:, :9] += bias[head // 2]
            seen = torch.cat([real[head // 2].expand(2, -1), visible[row]], dim=1)
            wanted = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values
            assert (found[row, head] - wanted).abs().max() < CLOSE
