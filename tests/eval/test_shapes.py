"""The shapes world: equal seeds, true answers, owner maps that agree with the pixels."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfast.eval.datasets import Shapes, render_clip, score
from mmfast.eval.datasets.shapes import (
    COLORS,
    CORE_FAMILIES,
    EXTRA_FAMILIES,
    FAMILIES,
    SHAPES,
    Item,
    Question,
    Scene,
    ask,
    render,
    sample_scene,
)

seeds = st.integers(0, 2**32 - 1)
GREY = 110
SINGULAR = {**{f"{kind}s": kind for kind in SHAPES}, "crosses": "cross"}
FIRST = ("shapes1/heldout/0/scene0/exist", "can you see an orange ring?", "no")


def named(scene: Scene, phrase: str) -> Item:
    """The one object a phrase means."""
    *color, kind = phrase.split()
    (item,) = [i for i in scene.items if i.kind == kind and (not color or i.color == color[0])]
    return item


def holds(item: Item, thing: str) -> bool:
    """Whether a shape is "a star", "a red star" or "a red shape"."""
    words = [SINGULAR.get(word, word) for word in thing.split() if word not in ("shape", "shapes")]
    return not item.is_text and all(word in (item.kind, item.color) for word in words)


def true_answer(scene: Scene, text: str) -> str:
    """Answer a question from its words and the scene alone, in another way than the library does."""
    if m := re.fullmatch(r"(?:is there|can you see|does the image contain) an? (.+)\?", text):
        return "yes" if any(holds(item, m[1]) for item in scene.items) else "no"
    if m := re.fullmatch(r"what (?:color is|is the color of) the (.+)\?", text):
        return named(scene, m[1]).color
    if m := re.fullmatch(r"what (?:shape is|is the shape of) the (\w+) object\?", text):
        (item,) = [item for item in scene.items if item.color == m[1]]
        return item.kind
    if m := re.fullmatch(r"is the (.+) small or large\?", text):
        return "small" if named(scene, m[1]).radius < 17 else "large"
    if m := re.fullmatch(r"where is the (.+)\?", text):
        item = named(scene, m[1])
        row = ["top ", "", "bottom "][item.y * 3 // 224]
        column = ["left", "", "right"][item.x * 3 // 224]
        return (row + column).strip() or "center"
    if m := re.fullmatch(r"what does the (?:(\w+) )?text say\?|what is written in the image\?|read the text\.", text):
        return " ".join(named(scene, f"{m[1]} text" if m[1] else "text").text)
    if m := re.fullmatch(r"how many (.+) are there\?", text):
        return str(sum(holds(item, m[1]) for item in scene.items))
    if m := re.fullmatch(r"is the (.+) (left or right of|above or below) the (.+)\?", text):
        one, other = named(scene, m[1]), named(scene, m[3])
        if m[2].startswith("left"):
            return "left" if one.x < other.x else "right"
        return "above" if one.y < other.y else "below"
    if m := re.fullmatch(r"are there more (\w+) than (\w+)\?", text):
        one, other = (sum(holds(item, thing) for item in scene.items) for thing in m.groups())
        assert one != other
        return "yes" if one > other else "no"
    if m := re.fullmatch(r"what is the most common (shape|color)\?", text):
        counts = Counter(item.kind if m[1] == "shape" else item.color for item in scene.shapes)
        assert sorted(counts.values())[-1] > sorted(counts.values())[-2]
        return max(counts, key=lambda word: counts[word])
    raise AssertionError(f"no rule for {text!r}")


def alpha_in_picture(item: Item) -> np.ndarray:
    """Coverage of each pixel by an object, read off a picture of it alone."""
    pixels = np.asarray(render(Scene((item,))).image, np.float64)
    channel = int(np.argmax([abs(c - GREY) for c in COLORS[item.color]]))
    return (pixels[..., channel] - GREY) / (COLORS[item.color][channel] - GREY)


def test_equal_seeds_give_equal_records() -> None:
    one, two = (list(Shapes(seed=4, num_questions=30)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert (a.question_id, a.question, a.answer, a.object_ids, a.scene) == (
            b.question_id,
            b.question,
            b.answer,
            b.object_ids,
            b.scene,
        )
        assert a.image.tobytes() == b.image.tobytes()
        np.testing.assert_array_equal(a.owners, b.owners)


def test_first_scene_has_not_changed() -> None:
    # Whoever changes what a seed gives raises WORLD_VERSION, and this.
    record = next(iter(Shapes(num_questions=1)))
    assert (record.question_id, record.question, record.answer) == FIRST


def test_splits_and_seeds_differ_and_an_id_names_one_question() -> None:
    sets = [Shapes(split, seed, num_questions=12) for split in ("train", "heldout", "test") for seed in (0, 1)]
    pictures = [next(iter(data)).image.tobytes() for data in sets]
    assert len(set(pictures)) == len(sets)
    ids = [record.question_id for data in sets for record in data]
    assert len(set(ids)) == len(ids)
    everything = {r.question_id: (r.question, r.answer) for r in Shapes(families=FAMILIES, num_questions=110)}
    for record in Shapes(families=["where"], num_questions=5):
        assert everything[record.question_id] == (record.question, record.answer)


def test_families_are_balanced_and_so_are_yes_and_no() -> None:
    records = list(Shapes(num_questions=602))
    counts = Counter(record.family for record in records)
    assert [counts[family] for family in CORE_FAMILIES] == [101, 101, 100, 100, 100, 100]
    answers = Counter(r.answer for r in Shapes(families=["exist"], num_questions=600))
    assert set(answers) == {"yes", "no"}
    assert 270 <= answers["yes"] <= 330
    colors = Counter(r.answer for r in Shapes(families=["color"], num_questions=400))
    assert max(colors.values()) < 0.25 * 400


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_answers_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    questions = [q for q in ask(scene, rng, FAMILIES) if q.family != "caption"]
    for question in questions:
        assert true_answer(scene, question.text) == question.answer
        assert set(question.object_ids) <= {item.ident for item in scene.items}


HAND = Scene(
    (
        Item(0, "star", "red", 40, 40, 20),
        Item(1, "star", "blue", 180, 40, 10),
        Item(2, "ring", "green", 112, 112, 25, 12),
        Item(3, "text", "white", 112, 190, 30, text="A7"),
    )
)


def possible(family: str) -> set[Question]:
    return {q for seed in range(80) for q in ask(HAND, np.random.default_rng(seed), [family])}


def test_hand_made_scene() -> None:
    assert {(q.text, q.answer, q.object_ids) for q in possible("where")} == {
        ("where is the red star?", "top left", (0,)),
        ("where is the blue star?", "top right", (1,)),
        ("where is the ring?", "center", (2,)),
        ("where is the green ring?", "center", (2,)),
        ("where is the text?", "bottom", (3,)),
        ("where is the white text?", "bottom", (3,)),
    }
    # "the star" would be ambiguous, so no question says it.
    assert {(q.text.split()[-1], q.answer) for q in possible("color")} == {("ring?", "green"), ("text?", "white")}
    assert {(q.text, q.answer) for q in possible("read")} == {
        ("what does the text say?", "A 7"),
        ("what is written in the image?", "A 7"),
        ("read the text.", "A 7"),
    }
    assert {(q.text, q.answer) for q in possible("most")} == {("what is the most common shape?", "star")}
    caption = "a large red star, a small blue star, a large green ring, the white text A 7"
    assert {(q.text, q.answer, q.object_ids) for q in possible("caption")} == {
        ("describe the image.", caption, (0, 1, 2, 3))
    }
    for family in ("exist", "size", "count", "rel", "more", "shape"):
        assert possible(family)
        for question in possible(family):
            assert true_answer(HAND, question.text) == question.answer
    negatives = [q for q in possible("exist") if q.answer == "no"]
    assert negatives
    assert all(q.object_ids == () for q in negatives)


def test_a_scene_without_objects_allows_only_counting() -> None:
    questions = [q for seed in range(20) for q in ask(Scene(()), np.random.default_rng(seed), FAMILIES)]
    assert {(q.family, q.answer) for q in questions} == {("count", "0")}


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_owners_agree_with_the_pixels(seed: int) -> None:
    scene = Scene(sample_scene(np.random.default_rng(seed)).items)
    owners = render(scene).owners
    shares = [alpha_in_picture(item).reshape(16, 14, 16, 14).mean(axis=(1, 3)) for item in scene.items]
    best = np.max([np.zeros((16, 16)), *shares], axis=0)
    for row, col in np.ndindex(16, 16):
        owner = owners[row, col]
        if owner < 0:
            assert best[row, col] <= 0.105
            continue
        index = [item.ident for item in scene.items].index(owner)
        item = scene.items[index]
        is_centre = row == item.y // 14 and abs(col - item.x / 14) <= len(item.text) * item.radius / 14 + 1
        assert is_centre or (shares[index][row, col] > 0.095 and shares[index][row, col] >= best[row, col] - 0.01)
    for item in scene.items:
        if not item.is_text:
            assert owners[item.y // 14, item.x // 14] == item.ident


@settings(max_examples=40, deadline=None)
@given(seeds)
@example(441785)
def test_objects_lie_apart_and_inside(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    assert 1 <= len(scene.shapes) <= 7
    assert len(scene.texts) <= 2
    drawn = [alpha_in_picture(item) > 0.02 for item in scene.items]
    assert sum(mask.astype(int) for mask in drawn).max() == 1
    for item in scene.items:
        # Nothing is cut off: an object covers as much where it stands as it does in the middle.
        middle = replace(item, x=112, y=112)
        assert alpha_in_picture(item).sum() == pytest.approx(alpha_in_picture(middle).sum(), rel=1e-9)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_fill_their_circle_and_look_different(kind: str) -> None:
    areas = {other: alpha_in_picture(Item(0, other, "red", 112, 112, 30)) for other in SHAPES}
    assert 0.2 < areas[kind].sum() / (np.pi * 30**2) < 1.0
    for other in SHAPES:
        if other != kind:
            assert np.abs(areas[kind] - areas[other]).sum() > 0.1 * areas[kind].sum()


def test_pictures_have_the_colors_of_the_shipped_scenes() -> None:
    folder = files("mmfast") / "data" / "samples" / "scenes"
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row["family"] == "color"]
    assert asked
    for row in asked:
        pixels = np.asarray(Image.open(str(folder / row["image"])).convert("RGB"))
        assert (pixels == COLORS[row["answer"]]).all(axis=-1).sum() > 30


def test_backgrounds_vary_and_stay_grey() -> None:
    pictures = [np.asarray(render(Scene((), seed)).image, np.float64) for seed in range(12)]
    assert len({picture.tobytes() for picture in pictures}) == 12
    for picture in pictures:
        means = picture.mean(axis=(0, 1))
        assert 40 < means.mean() < 170
        assert np.ptp(means) < 20


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6))
def test_clip_answers_hold_in_every_frame(seed: int, num_frames: int) -> None:
    clip = render_clip(seed, num_frames)
    assert len(clip.frames) == len(clip.scenes) == num_frames
    assert clip.owners.shape == (num_frames, 16, 16)
    for question in clip.questions:
        if question.family != "direction":
            assert {true_answer(scene, question.text) for scene in clip.scenes} == {question.answer}
    for scene in clip.scenes:
        drawn = [alpha_in_picture(item) > 0.02 for item in scene.items]
        assert sum(mask.astype(int) for mask in drawn).max() == 1


def test_a_finer_clip_shows_the_same_motion() -> None:
    coarse, fine = render_clip(8, 3), render_clip(8, 9)
    assert coarse.scenes == fine.scenes[::4]
    assert coarse.questions == fine.questions
    assert coarse.frames[0].tobytes() == fine.frames[0].tobytes()
    assert coarse.scenes[0] != coarse.scenes[1]


def test_direction_is_the_way_an_object_goes() -> None:
    checked = 0
    for seed in range(60):
        clip = render_clip(seed, 5, families=["direction"])
        for question in clip.questions:
            places = np.array(
                [next((i.x, i.y) for i in s.items if i.ident == question.object_ids[0]) for s in clip.scenes]
            )
            steps = np.diff(places, axis=0)
            axis, sign = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}[question.answer]
            assert (sign * steps[:, axis] > 0).all()
            assert (np.abs(steps[:, axis]) > np.abs(steps[:, 1 - axis])).all()
            checked += 1
    assert checked > 20


def test_clip_records_and_size() -> None:
    records = list(Shapes(num_frames=3, num_questions=7))
    assert Counter(record.family for record in records) == {"exist": 2, "color": 2, "shape": 2, "size": 1}
    assert all(len(record.frames) == 3 and record.owners.shape == (3, 16, 16) for record in records)
    clip = render_clip(1, 2, size=96)
    assert [frame.size for frame in clip.frames] == [(96, 96)] * 2


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        (" yes", "yes", True),
        ("Top  right .", "top right", True),
        ("R U B.", "R U B", True),
        ("R U", "R U B", False),
        ("", "yes", False),
        ("yes no", "yes", False),
    ],
)
def test_score(prediction: str, answer: str, right: bool) -> None:
    assert score(prediction, answer) is right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_questions": 0}, "num_questions must be at least 1"),
        ({"families": ["colour"]}, "families must be some of"),
        ({"families": []}, "families must be some of"),
        ({"families": ["count"], "num_frames": 2}, "families must be some of"),
    ],
)
def test_shapes_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**arguments)  # type: ignore[arg-type]


def test_items_and_clips_refuse() -> None:
    with pytest.raises(ValueError, match="kind must be 'text' or one of"):
        Item(0, "hexagon", "red", 0, 0, 9)
    with pytest.raises(ValueError, match="color must be one of"):
        Item(0, "star", "pink", 0, 0, 9)
    with pytest.raises(ValueError, match="radius must be at least 1"):
        Item(0, "star", "red", 0, 0, 0)
    with pytest.raises(ValueError, match="text must be given"):
        Item(0, "text", "red", 0, 0, 9)
    with pytest.raises(ValueError, match="text may hold"):
        Item(0, "text", "red", 0, 0, 9, text="a")
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        render_clip(0, 0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        render_clip(0, 1, size=0)


def test_every_extra_family_occurs() -> None:
    assert {r.family for r in Shapes(families=EXTRA_FAMILIES, num_questions=5)} == set(EXTRA_FAMILIES)
