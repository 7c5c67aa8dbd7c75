"""The recipe of the embedded model: labels, packed questions, and its stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets.shapes.render import render
from mmfast.training.default_model import recipe
from mmfast.training.default_model.calibrations import PLANS, write_calibrations
from mmfast.training.default_model.packing import Packer
from mmfast.training.default_model.student import Student
from mmfast.training.default_model.world import LABELS, PATCHES, Episode, clip, generator, picture
from mmfast.training.objective import IGNORED
from mmfast.training.trainer import read_log, train


@pytest.fixture(scope="module")
def student() -> Student:
    found = Student(layers=2, seed=3)
    # The ends of residual branches begin at zero; here every part has to count.
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance))
    return found.eval()


def test_labels_say_what_the_scene_holds() -> None:
    episode = picture(generator(1), crowded=True, pixels=False)
    there = torch.from_numpy(episode.owners >= 0)
    assert torch.equal(episode.labels["shape"] > 0, there)
    assert torch.equal(episode.labels["color"] > 0, there)
    assert all(int(values.max()) < LABELS[name] for name, values in episode.labels.items())
    centres = sum(len(item.text) or 1 for item in episode.scenes[0].items)
    assert int(episode.labels["centre"].sum()) <= centres
    read = episode.labels["character"][episode.labels["centre"].bool()]
    assert int((read > 0).sum()) == sum(len(item.text) for item in episode.scenes[0].texts)


@torch.no_grad()
def test_the_place_loss_asks_for_the_words_of_the_place(student: Student) -> None:
    episode = picture(generator(5), pixels=False)
    visual = student.symbols(episode.labels, student.language.embed_tokens.weight)
    right = student.place_loss(visual, episode.labels)
    # Upside down: what says "top" lies at the bottom.
    turned = {**episode.labels, "row": episode.labels["row"].flip(1)}
    assert float(student.place_loss(visual, turned)) > float(right) + 0.1
    nothing = {name: torch.zeros_like(values) for name, values in episode.labels.items()}
    assert float(student.place_loss(visual, nothing)) == 0.0


def test_training_draws_the_same_again() -> None:
    first, second = (clip(generator(5), 3) for _ in range(2))
    assert first.scenes == second.scenes
    assert torch.equal(first.pixels, second.pixels)  # type: ignore[arg-type]
    assert picture(generator(6)).scenes != picture(generator(7)).scenes


def asked_alone(student: Student, episode: Episode, images: list[Image.Image], question: str) -> torch.Tensor:
    """The logits of the first token of an answer, from the model itself."""
    media: dict[str, Any] = {"images": images} if len(images) == 1 else {"video_frames": images}
    inputs = prepare(student.processor, question, **media)
    with torch.no_grad():
        logits: torch.Tensor = student.model(**inputs).logits[0, -1]
    return logits


@pytest.mark.parametrize("frames", [1, 2])
def test_packed_questions_are_answered_as_single_ones(student: Student, frames: int) -> None:
    episode = picture(generator(2)) if frames == 1 else clip(generator(4), frames)
    packer, rng = Packer(student.processor), np.random.default_rng(0)
    packed = packer.pack([episode], [[np.arange(PATCHES)] * frames], compact=False, questions=4, rng=rng)
    with torch.no_grad():
        features, _ = student.see(episode.pixels)  # type: ignore[arg-type]
        embeds = student.language.embed_tokens(packed.ids)
        embeds[packed.places[:, 0], packed.places[:, 1]] = student.projector(features).flatten(0, 1)
        mask = torch.zeros(packed.visible.shape).masked_fill(~packed.visible, torch.finfo(torch.float32).min)
        states = student.language(
            inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
    together = states[packed.asked[:, 0], packed.asked[:, 1]] @ student.language.embed_tokens.weight.T
    images = [render(scene).image for scene in episode.scenes]
    if frames > 1:
        # A clip shares one background, which its scenes name as well.
        assert len({scene.backdrop for scene in episode.scenes}) == 1
    order = np.random.default_rng(0).permutation(len(episode.questions))[:4]
    assert len(order) == len(together)
    for logits, index in zip(together, order, strict=True):
        alone = asked_alone(student, episode, images, episode.questions[int(index)].text)
        torch.testing.assert_close(logits, alone, atol=2e-4, rtol=2e-4)


def test_targets_spell_the_answers(student: Student) -> None:
    episode = picture(generator(8), extras=1.0, pixels=False)
    packer = Packer(student.processor)
    packed = packer.pack([episode], [[np.array([0, 9])]], compact=True, questions=20, rng=np.random.default_rng(1))
    text = student.processor.tokenizer.decode(packed.targets[packed.targets != IGNORED])
    assert sorted(part.strip() for part in text.split("</s>") if part) == sorted(q.answer for q in episode.questions)


def test_objects_asked_about_are_known(student: Student) -> None:
    episode = picture(generator(8), pixels=False)
    packed = Packer(student.processor).pack(
        [episode], [[np.arange(PATCHES)]], compact=False, questions=20, rng=np.random.default_rng(1)
    )
    order = np.random.default_rng(1).permutation(len(episode.questions))
    for owned, index in zip(packed.owned, order, strict=True):
        wanted = np.isin(episode.owners[0], episode.questions[int(index)].object_ids)
        assert int(owned.sum()) == int(wanted.sum())


@pytest.mark.slow
def test_every_stage_learns_resumes_and_hands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")
    parts = tuple(
        replace(part, settings=replace(part.settings, steps=6, batch=2, warmup=1, checkpoint_every=2, log_every=1))
        for part in recipe.PARTS
    )
    monkeypatch.setattr(recipe, "PARTS", parts)
    monkeypatch.setattr(recipe, "LAYERS", 2)
    for part in parts:
        recipe.run(part, tmp_path, stop_after=4, progress=False)
        recipe.run(part, tmp_path, progress=False)
        recipe.run(part, tmp_path / "whole", progress=False)
        logs = [[line["loss"] for line in read_log(home / part.name)] for home in (tmp_path, tmp_path / "whole")]
        assert logs[0] == logs[1]
        assert np.mean(logs[0][-2:]) < logs[0][0]
    recipe.export(tmp_path, tmp_path / "model")
    from mmfast.adapters import load_pretrained

    model, _ = load_pretrained(str(tmp_path / "model"))
    assert model.config.text_config.num_hidden_layers == 2
    assert (tmp_path / "model" / "TRAINING.json").is_file()


def test_calibrations_are_plans_for_the_embedded_model(tmp_path: Path) -> None:
    paths = write_calibrations(tmp_path, prompts=1)
    assert sorted(path.stem for path in paths) == sorted(PLANS)
    model, _ = mmfast.load_default()
    for path in paths:
        with mmfast.accelerate(model, str(path)) as fast:
            # Fitted: no longer what the plan said before it saw the model.
            assert path.stem in fast.report().plan
            assert fast.report().plan != mmfast.Plan.parse(PLANS[path.stem]).to_text()


@pytest.mark.parametrize("part", recipe.PARTS, ids=lambda part: part.name)
@pytest.mark.parametrize("done", [0.1, 0.9])
def test_a_stage_makes_its_tensors_where_the_student_is(part: recipe.Part, done: float) -> None:
    stage = part.stage(Student(2), 0, 1)
    batch = stage.batch(0, 0, 1, 1)
    wanted = stage(batch, done).total
    # Whatever does not follow the weights ends up on this device, and cannot be computed with.
    with torch.device("meta"):
        found = stage(batch, done).total
    assert torch.equal(found, wanted)


def test_a_stage_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the stage 'vision' first"):
        recipe.run(recipe.PARTS[2], tmp_path)


def test_both_first_stages_take_a_step(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")
    for part in recipe.PARTS[:2]:
        settings = replace(part.settings, steps=1, batch=1, warmup=0)
        figures = train(part.stage(Student(2), 0, 1), settings, tmp_path / part.name, progress=False)
        assert figures["loss"] > 0
