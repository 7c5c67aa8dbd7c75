"""Training of draft heads on a few answers of the embedded model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmfast
from mmfast.registry import build
from mmfast.training import draft_heads
from mmfast.training.draft_heads import Answer, Recipe
from support.drafting import Toy

METHODS = ("flash", "hydra", "medusa", "msd", "vispec")
SHORT = Recipe(prompts=8, new_tokens=8, batch=4)


@cache
def collected() -> tuple[Any, list[Answer]]:
    model, processor = mmfast.load_default()
    model.requires_grad_(False)
    asked = draft_heads.questions("train", SHORT.prompts, SHORT.seed)
    return model, draft_heads.collect(model, processor, asked, SHORT, progress=False)


def test_answers_are_what_the_model_thought() -> None:
    model, answers = collected()
    assert len(answers) == 8
    for answer in answers:
        text, start = answer.text, answer.start
        assert len(text.ids) == start + 8
        assert model.generation_config.eos_token_id not in text.ids[start:].tolist()
        assert int(text.visual.sum()) == 256
        assert set(text.media[text.visual].tolist()) == {0}
        head = model.get_output_embeddings()
        taught = draft_heads.taught(head(answer.wanted), [model.generation_config.eos_token_id])
        torch.testing.assert_close(taught, answer.laws, atol=1e-5, rtol=0)
        # Where the text is, what entered the decoder are the embeddings of the tokens.
        plain = ~text.visual
        assert torch.equal(text.embeds[plain], model.get_input_embeddings()(text.ids[plain]))


def test_laws_are_learned_with_the_end_and_without() -> None:
    laws = draft_heads.taught(torch.tensor([[0.6, 0.3, 0.1]]).log(), [0])
    torch.testing.assert_close(laws, torch.tensor([[0.3, (0.3 + 0.75) / 2, (0.1 + 0.25) / 2]]))


def test_some_answers_are_drawn_and_the_seed_says_how() -> None:
    model, answers = collected()
    _, processor = mmfast.load_default()
    asked = list(draft_heads.questions("train", 8, 0))

    def ids(seed: int, sampled: float) -> list[list[int]]:
        recipe = replace(SHORT, seed=seed, sampled=sampled)
        torch.manual_seed(123 + seed)
        state = torch.get_rng_state()
        found = draft_heads.collect(model, processor, asked, recipe, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        return [answer.text.ids[answer.start :].tolist() for answer in found]

    assert ids(0, SHORT.sampled) == [answer.text.ids[answer.start :].tolist() for answer in answers]
    greedy = ids(0, 0.0)
    assert greedy == ids(1, 0.0)
    differing = sum(a != b for a, b in zip(greedy, ids(0, SHORT.sampled), strict=True))
    assert 0 < differing <= 2
    assert ids(0, 1.0) != ids(1, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_lower_the_loss(method: str) -> None:
    model, answers = collected()
    recipe = replace(SHORT, method=method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head, history = draft_heads.train(model, answers, recipe, steps=20, progress=False)
    assert len(history) == 20
    # ViSpec changes its loss half way.
    end = 10 if method == "vispec" else 20
    assert sum(history[end - 3 : end]) < 0.8 * sum(history[:3])
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for value in head.state_dict().values():
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("method", ["msd", "medusa"])
def test_seeds_repeat_a_training(method: str) -> None:
    model, answers = collected()
    recipe = replace(SHORT, method=method)
    torch.manual_seed(5)
    first, losses = draft_heads.train(model, answers, recipe, steps=4, progress=False)
    torch.manual_seed(6)
    second, again = draft_heads.train(model, answers, recipe, steps=4, progress=False)
    assert losses == again
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    _, other = draft_heads.train(model, answers, replace(recipe, seed=1), steps=4, progress=False)
    assert other != losses


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_what_a_drafter_reads(method: str, tmp_path: Path) -> None:
    model, answers = collected()
    recipe = replace(SHORT, method=method)
    head, _ = draft_heads.train(model, answers, recipe, steps=2, progress=False)
    draft_heads.save_head(head, model, recipe, tmp_path / "head")
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["method"]) == (128, 640, method)
    drafter: Any = build(method, {"path": str(tmp_path / "head")})
    toy = Toy(width=128, vocabulary=640)
    read = drafter.head(toy.request([toy.prompt([4])])).state_dict()
    assert read.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(read[name], value.float(), atol=0, rtol=0)


def test_the_shortest_answers_still_teach() -> None:
    """Heads that look further than an answer goes are left out of its loss."""
    model, answers = collected()
    text, start = answers[0].text, answers[0].start
    end = start + 2
    cut = replace(
        text,
        ids=text.ids[:end],
        visual=text.visual[:end],
        media=text.media[:end],
        embeds=text.embeds[:end],
        hidden=text.hidden[:end],
        positions=text.positions[:end],
    )
    for method in METHODS:
        short = [Answer(cut, start, answers[0].laws[:2])]
        _, history = draft_heads.train(model, short, replace(SHORT, method=method), steps=2, progress=False)
        assert all(value == value and value < 1e3 for value in history)


def test_a_head_begins_as_the_last_layer() -> None:
    model, _ = collected()
    head: Any = draft_heads.new_head(model, SHORT)
    last = model.get_decoder().layers[-1]
    assert torch.equal(head.layers[0].mlp.up_proj.weight, last.mlp.up_proj.weight)
    x, y = torch.randn(2, 3, 128)
    torch.testing.assert_close(head.fuse(x, y, None), (x + y) / 2)


def test_prompts_may_come_without_a_picture() -> None:
    model, _ = collected()
    _, processor = mmfast.load_default()
    found = draft_heads.collect(model, processor, [("what color is the ring?", None)], SHORT, progress=False)
    assert not bool(found[0].text.visual.any())
    _, history = draft_heads.train(model, found, replace(SHORT, method="vispec"), steps=3, progress=False)
    assert len(history) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "method": "eagle9",
        "prompts": 0,
        "new_tokens": 1,
        "epochs": 0,
        "batch": 0,
        "unroll": -1,
        "sampled": 1.5,
    }.items(),
)
def test_recipes_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        Recipe(**{field: value})


def test_positions_of_several_dimensions_are_refused() -> None:
    model, processor = mmfast.load_default()
    model.config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    with pytest.raises(ValueError, match="positions of this model have several dimensions"):
        draft_heads.collect(model, processor, [], SHORT)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "medusa", "--out", str(tmp_path / "medusa"), "--prompts", "2", "--epochs", "1"]
    assert draft_heads.main(arguments) == 0
    assert "written to" in capsys.readouterr().out
    assert (tmp_path / "medusa" / "model.safetensors").is_file()
