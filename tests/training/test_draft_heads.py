"""Training of draft heads on a few answers of the embedded model."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mmfast
from mmfast.registry import build
from mmfast.training.conversations import Conversation, Source, WorldSource
from mmfast.training.draft_heads import answers as draft_heads_answers
from mmfast.training.draft_heads.answers import Answer, Answers, noisy, recall, taught, write
from mmfast.training.draft_heads.objective import DraftHead, new_head, share_of_pictures
from mmfast.training.draft_heads.options import METHODS, HeadOptions
from mmfast.training.draft_heads.teaching import KINDS, output_of
from mmfast.training.recipe import Recipe
from mmfast.training.settings import Settings
from mmfast.training.trainer import read_log, train
from support.drafting import Toy

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = HeadOptions(prompts=8, new_tokens=8, together=4, held_out=0)
SETTINGS = Settings(
    steps=20,
    batch=4,
    learning_rate=2e-3,
    adam_beta2=0.95,
    warmup=1,
    final=0.0,
    clip=0.0,
    clip_value=0.5,
    log_every=1,
    checkpoint_every=100,
)


class Mixed(Source):
    """Questions of the rendered world, every other one without its picture."""

    def __init__(self, mute: bool = False) -> None:
        self.world, self.mute = WorldSource(families=["color"]), mute

    def at(self, number: int) -> Conversation:
        found = self.world.at(number)
        return replace(found, images=()) if self.mute or number % 2 else found


@cache
def demo() -> tuple[Any, Any]:
    return mmfast.load_default(dtype="float32")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run, with the answers."""
    folder: Path = tmp_path_factory.mktemp("run")
    Answers(*demo(), WorldSource(), SHORT).collect(folder)
    return folder


def answers(folder: Path) -> list[Answer]:
    collected = Answers(*demo(), WorldSource(), SHORT)
    collected.collect(folder)
    return [collected.at(number) for number in range(len(collected))]


def objective(folder: Path, options: HeadOptions) -> DraftHead:
    """One that has its answers."""
    made = DraftHead(*demo(), WorldSource(), options)
    made.begin(folder, 0, 1)
    return made


def test_answers_are_what_the_model_thought(written: Path) -> None:
    model, _ = demo()
    found = answers(written)
    assert len(found) == 8
    for answer in found:
        text, start = answer.text, answer.start
        assert len(text.ids) == start + 8
        assert model.generation_config.eos_token_id not in text.ids[start:].tolist()
        assert int(text.visual.sum()) == 256
        assert set(text.media[text.visual].tolist()) == {0}
        head = model.get_output_embeddings()
        laws = taught(head(answer.wanted), [model.generation_config.eos_token_id])
        torch.testing.assert_close(laws, answer.laws, atol=1e-5, rtol=0)
        # Where the text is, what entered the decoder are the embeddings of the tokens.
        plain = ~text.visual
        assert torch.equal(text.embeds[plain], model.get_input_embeddings()(text.ids[plain]))


def test_greedy_answers_are_what_the_model_likes_most(written: Path) -> None:
    """The states belong to the places they are said to belong to."""
    model, _ = demo()
    first = answers(written)[0]
    before = model.get_output_embeddings()(first.text.hidden[first.start - 1 : -1])
    before[:, model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(before.argmax(dim=-1), first.text.ids[first.start :])


def test_laws_are_learned_with_the_end_and_without() -> None:
    laws = torch.tensor([[0.6, 0.3, 0.1]]).log()
    torch.testing.assert_close(taught(laws, [0]), torch.tensor([[0.3, (0.3 + 0.75) / 2, (0.1 + 0.25) / 2]]))
    torch.testing.assert_close(taught(laws, []), laws.exp())


def test_some_answers_are_drawn_and_the_seed_says_how() -> None:
    asked = [WorldSource().at(number) for number in range(4)]

    def ids(seed: int, sampled: float) -> list[list[int]]:
        torch.manual_seed(123 + seed)
        state = torch.get_rng_state()
        found = write(*demo(), asked, range(4), replace(SHORT, seed=seed, sampled=sampled))
        assert torch.equal(torch.get_rng_state(), state)
        return [row.answer.tolist() for row in found]

    greedy = ids(0, 0.0)
    assert greedy == ids(1, 0.0)
    some = ids(0, 0.5)
    assert some == ids(0, 0.5)
    assert [a == b for a, b in zip(greedy, some, strict=True)][::2] == [True, True]
    assert some != greedy
    assert ids(0, 1.0) != ids(1, 1.0)


def test_answers_may_end() -> None:
    model, _ = demo()
    end = model.generation_config.eos_token_id
    options = replace(SHORT, past_end=False, sampled=0.0)
    asked = [WorldSource().at(number) for number in range(4)]
    rows = write(*demo(), asked, range(4), options)
    assert all(row.answer.tolist().index(end) == len(row.answer) - 1 for row in rows)
    answer = recall(*demo(), asked[0], rows[0], options)
    law = model.get_output_embeddings()(answer.wanted).softmax(dim=-1)
    torch.testing.assert_close(answer.laws, law, atol=1e-5, rtol=0)


def test_a_run_that_goes_on_does_not_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_heads_answers, "BLOCK", 2)
    options = replace(SHORT, prompts=6)
    asked: list[int] = []

    def counted(*arguments: Any) -> Any:
        asked.extend(arguments[3])
        return write(*arguments)

    monkeypatch.setattr(draft_heads_answers, "write", counted)
    Answers(*demo(), WorldSource(), options).collect(tmp_path)
    blocks = sorted((tmp_path / "answers").glob("*.safetensors"))
    whole = [load_file(block) for block in blocks]
    assert (asked, len(blocks)) == ([0, 1, 2, 3, 4, 5], 3)
    # As if the process had died in the second file.
    for block in blocks[1:]:
        block.unlink()
    blocks[1].with_suffix(".part").write_bytes(b"torn")
    asked.clear()
    # Two processes share what is missing.
    for part in (0, 1):
        Answers(*demo(), WorldSource(), options).collect(tmp_path, part, 2)
    assert sorted(asked) == [2, 3, 4, 5]
    for block, tensors in zip(blocks, whole, strict=True):
        again = load_file(block)
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
    with pytest.raises(ValueError, match=r"answers of a run with new_tokens=8 \(now 9\); train into another folder"):
        Answers(*demo(), WorldSource(), replace(options, new_tokens=9)).collect(tmp_path)
    # How much is remembered changes nothing.
    forgetful = Answers(*demo(), WorldSource(), replace(options, memory=0.0, held_out=3))
    forgetful.collect(tmp_path)
    assert forgetful.at(1) is not forgetful.at(1)
    assert torch.equal(forgetful.at(1).laws, forgetful.at(1).laws)


def test_answers_of_a_run_that_was_killed_are_not_continued_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_heads_answers, "BLOCK", 2)
    options = replace(SHORT, prompts=4, new_tokens=4)

    def killed(*arguments: Any) -> Any:
        if 2 in arguments[3]:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(draft_heads_answers, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        Answers(*demo(), WorldSource(), options).collect(tmp_path)
    with pytest.raises(ValueError, match=r"sampled=0.3 \(now 0.0\)"):
        Answers(*demo(), WorldSource(), replace(options, sampled=0.0)).collect(tmp_path)
    (tmp_path / "answers" / "options.json").unlink()
    with pytest.raises(ValueError, match=r"holds answers but no options\.json"):
        Answers(*demo(), WorldSource(), options).collect(tmp_path)


def test_answers_to_other_questions_are_refused(written: Path) -> None:
    other = Answers(*demo(), WorldSource(families=["shape"], seed=3), SHORT)
    other.collect(written)
    asked = [source.at(0).turns[0][0] for source in (other.source, WorldSource())]
    assert asked[0] != asked[1]
    with pytest.raises(ValueError, match="the stored answer is to another question"):
        other.at(0)
    with pytest.raises(ValueError, match="no answers yet"):
        Answers(*demo(), WorldSource(), SHORT).at(0)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_lower_the_loss(method: str, written: Path, tmp_path: Path) -> None:
    model, _ = demo()
    # Answers that one kind of head has learned from serve the others.
    shutil.copytree(written / "answers", tmp_path / "answers")
    learner = objective(written, replace(SHORT, method=method))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(learner, SETTINGS, tmp_path, progress=False)
    log = read_log(tmp_path)
    history = [line["loss"] for line in log]
    # ViSpec changes its loss half way.
    end = 10 if method == "vispec" else 20
    assert len(history) == 20
    assert sum(history[end - 3 : end]) < 0.8 * sum(history[:3])
    assert all(0 <= line["tokens_right"] <= 1 for line in log)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # What is written is what a drafter reads.
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["method"]) == (128, 640, method)
    drafter: Any = build(method, {"path": str(tmp_path)})
    toy = Toy(width=128, vocabulary=640)
    read = drafter.head(toy.request([toy.prompt([4])])).state_dict()
    assert read.keys() == stored.keys()
    for name, value in stored.items():
        assert bool(value.isfinite().all())
        torch.testing.assert_close(read[name], value.float(), atol=0, rtol=0)


def test_a_run_that_was_broken_off_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    options, settings = replace(SHORT, prompts=5, new_tokens=4), replace(SETTINGS, steps=4, batch=2)

    def fresh(seed: int = 0) -> DraftHead:
        torch.manual_seed(seed)
        return DraftHead(*demo(), WorldSource(), replace(options, seed=seed))

    whole, second = fresh(), fresh()
    last = train(whole, settings, tmp_path / "whole", progress=False)
    train(fresh(), settings, tmp_path / "parts", stop_after=2, progress=False)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert train(second, settings, tmp_path / "parts", progress=False)["loss"] == last["loss"]
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, second.head.state_dict()[name])
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert train(fresh(1), settings, tmp_path / "other", progress=False)["loss"] != last["loss"]


def test_each_pass_takes_every_answer_once(written: Path) -> None:
    learner = objective(written, SHORT)
    for turn in range(2):
        assert sorted(learner._number(turn * 8 + place) for place in range(8)) == list(range(8))
    assert [learner._number(place) for place in range(8)] != [learner._number(8 + place) for place in range(8)]
    # Two halves of a step hold what one whole step does.
    halves = [answer.where for part in (0, 1) for answer in learner.batch(3, part, 2, 2)]
    assert halves == [answer.where for answer in learner.batch(3, 0, 1, 4)]
    assert learner.describe(learner.batch(0, 0, 1, 2)).count("shapes") == 2


def test_noise_is_on_what_is_read_alone(written: Path) -> None:
    answer = answers(written)[0]
    found = noisy(answer, 0.2, torch.Generator().manual_seed(0))
    gap = (found.text.hidden - answer.text.hidden).abs()
    assert 0 < float(gap.max()) <= 0.1 * 512 / len(answer.text.ids) * 1.001
    assert torch.equal(found.wanted, answer.wanted)
    assert torch.equal(found.text.embeds, answer.text.embeds)


def test_what_is_not_a_number_stops_the_run(written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("stop", "skip"):
        shutil.copytree(written / "answers", tmp_path / name / "answers")
    learner = objective(written, SHORT)
    answer = learner.answers.at(learner._number(1))
    answer.text.hidden.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss is not finite, for shapes1/train/\S+, shapes1"):
        train(learner, replace(SETTINGS, steps=1, batch=2), tmp_path / "stop", progress=False)
    with caplog.at_level(logging.WARNING):
        train(learner, replace(SETTINGS, steps=1, batch=2, on_bad="skip"), tmp_path / "skip", progress=False)
    assert "the step is left out" in caplog.text
    assert all(bool(value.isfinite().all()) for value in learner.head.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_answers_still_teach(method: str, length: int, written: Path) -> None:
    """Heads that look further than an answer goes are left out of its loss."""
    whole = answers(written)[0]
    end = whole.start + length

    def cut(value: Tensor) -> Tensor:
        return value[:end]

    text = replace(whole.text, **{name: cut(value) for name, value in vars(whole.text).items()})
    answer = replace(whole, text=text, laws=whole.laws[:length], wanted=whole.wanted[:length])
    learner = objective(written, replace(SHORT, method=method))
    for done in (0.0, 0.9):
        loss = learner([answer], done)
        loss.total.backward()
        assert 0 < loss.total.item() < 1e3
    assert any(bool((weight.grad != 0).any()) for weight in learner.head.parameters() if weight.grad is not None)


def test_a_head_begins_as_the_last_layer() -> None:
    model, _ = demo()
    head: Any = new_head(model, SHORT)
    last = model.get_decoder().layers[-1]
    assert torch.equal(head.layers[0].mlp.up_proj.weight, last.mlp.up_proj.weight)
    x, y = torch.randn(2, 3, 128)
    torch.testing.assert_close(head.fuse(x, y, None), (x + y) / 2)


@pytest.mark.parametrize(
    ("options", "name", "size"),
    [
        (HeadOptions("medusa", levels=2), "1.0.linear.weight", 128),
        (HeadOptions("hydra", levels=2), "hydra_mlp.1.1.linear.weight", 128),
        (HeadOptions("flash", levels=2), "mlp.2.weight", 256),
        (HeadOptions("flash", queries=5), "A", 5),
        (HeadOptions("vispec", queries=3), "imadpt.q", 3),
    ],
)
def test_sizes_follow_the_options(options: HeadOptions, name: str, size: int) -> None:
    assert new_head(demo()[0], options).state_dict()[name].shape[0] == size


def test_the_output_layer_computes_in_its_own_type(written: Path) -> None:
    """A model in bfloat16 teaches a head in float32."""
    model, processor = mmfast.load_default(dtype="bfloat16")
    learner = DraftHead(model, processor, WorldSource(), replace(SHORT, method="vispec", prompts=1))
    rows = write(model, processor, [WorldSource().at(0)], [0], SHORT)
    answer = recall(model, processor, WorldSource().at(0), rows[0], SHORT)
    learner([answer], 0.9).total.backward()
    assert {weight.grad.dtype for weight in learner.head.parameters() if weight.grad is not None} == {torch.float32}
    assert output_of(model)(answer.wanted).dtype == torch.float32


def test_prompts_may_come_without_a_picture(tmp_path: Path) -> None:
    learner = DraftHead(*demo(), Mixed(mute=True), replace(SHORT, method="vispec", prompts=2))
    train(learner, replace(SETTINGS, steps=2, batch=2), tmp_path, progress=False)
    assert not any(learner.answers.sees(number) for number in range(2))
    assert len(read_log(tmp_path)) == 2


def test_text_comes_first(tmp_path: Path) -> None:
    """MSD's two stages: r = 0 up to the middle, then rising to 1."""
    assert [share_of_pictures(epoch, 10) for epoch in (1, 5, 6, 8, 10, 11)] == pytest.approx([0, 0, 0.2, 0.6, 1, 1])
    learner = DraftHead(*demo(), Mixed(), replace(SHORT, two_stage_epochs=4, new_tokens=2))
    learner.begin(tmp_path, 0, 1)
    seen = [[learner.answers.sees(learner._number(4 * epoch + i)) for i in range(4)] for epoch in range(6)]
    assert not any(any(epoch) for epoch in seen[:2])
    assert all(all(epoch) for epoch in seen[3:])
    assert len({learner._number(place) for place in range(4)}) == 4
    alone = DraftHead(*demo(), WorldSource(), replace(SHORT, prompts=2, two_stage_epochs=4, new_tokens=2))
    alone.begin(tmp_path / "alone", 0, 1)
    with pytest.raises(
        ValueError, match="two_stage_epochs=4 needs questions with pictures and without; of 2 there are 2"
    ):
        alone.batch(0, 0, 1, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "method": "eagle9",
        "prompts": 0,
        "new_tokens": 1,
        "unroll": -1,
        "together": True,
        "sampled": 1.5,
        "temperature": 0.0,
        "noise": -0.1,
        "memory": "much",
        "past_end": 1,
        "levels": 3,
        "queries": 3,
        "seed": -1,
    }.items(),
)
def test_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        HeadOptions(**{field: value})


def test_two_stages_are_those_of_msd() -> None:
    with pytest.raises(ValueError, match="two_stage_epochs=4 is for msd, not for medusa"):
        HeadOptions("medusa", two_stage_epochs=4)


def test_positions_of_several_dimensions_are_refused() -> None:
    model, processor = mmfast.load_default()
    model.config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    with pytest.raises(ValueError, match="positions of this model have several dimensions"):
        DraftHead(model, processor, WorldSource(), SHORT)


@pytest.mark.parametrize("method", METHODS)
def test_recipes_say_how_the_shipped_heads_were_made(method: str) -> None:
    recipe = Recipe.read(RECIPES / f"{method}.toml")
    options = HeadOptions(**recipe.options)
    shipped = json.loads((Path(mmfast.__file__).parent / "data" / "drafters" / method / "config.json").read_text())
    assert recipe.kind == "draft_head"
    assert asdict(options) == shipped["trained_with"]
    settings = recipe.settings
    assert (settings.clip, settings.clip_value, settings.adam_beta2) == (0.0, 0.5, 0.95)
    # The head itself has the sizes of the one in the package.
    stored = load_file(Path(mmfast.__file__).parent / "data" / "drafters" / method / "model.safetensors")
    made = new_head(demo()[0], options).state_dict()
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in stored.items()}
    assert KINDS.keys() == set(METHODS)


def test_what_was_exported_is_tried(tmp_path: Path) -> None:
    learner = DraftHead(*demo(), WorldSource(), replace(SHORT, method="medusa", prompts=2, held_out=2))
    figures = train(learner, replace(SETTINGS, steps=2, batch=2), tmp_path, progress=False)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert {name: figures[name] for name in stored} == stored
    assert stored["same_as_plain"] == 1.0
    assert (stored["held_out_prompts"], stored["new_tokens"]) == (2, 16)
    assert stored["tau"] == pytest.approx(1 + stored["accepted_per_forward"], abs=0.2)
    assert 1 <= stored["tau"] <= 8
    # The model is as it was.
    assert "generate" not in vars(demo()[0])


@pytest.mark.slow
def test_a_short_training_drafts(tmp_path: Path) -> None:
    """A head of two minutes foretells more than one that has learned nothing, and changes no answer."""
    options = HeadOptions(prompts=160, new_tokens=24, held_out=12)
    settings = replace(SETTINGS, steps=240, batch=8, warmup=4, log_every=20)
    trained = train(DraftHead(*demo(), WorldSource(), options), settings, tmp_path / "trained", progress=False)
    untaught = replace(settings, steps=1, learning_rate=0.0)
    nothing = train(DraftHead(*demo(), WorldSource(), options), untaught, tmp_path / "nothing", progress=False)
    assert trained["same_as_plain"] == nothing["same_as_plain"] == 1.0
    assert trained["tau"] > 1.3
    assert trained["tau"] > nothing["tau"] + 0.4
