"""What holds for every data set in a folder: repeatable, complete, and clear about what is missing or broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmfast.eval.datasets import TASKS, task, task_class
from mmfast.eval.datasets.local import LocalTask
from mmfast.eval.task import Outcome, Sample

LayOut = Callable[..., Path]


class World(NamedTuple):
    """A made-up data set: options, the files to make, one of its texts, and what right answers come to."""

    options: dict[str, Any]
    media: tuple[str, ...]
    text: str
    best: float = 100.0


WORLDS = {
    "activitynet-qa": World({}, ("videos/v_1QIUV7WYKXg.mkv",), "test_q.json"),
    "chartqa": World({}, ("test/png/41699051005347.png", "test/png/two_col_101.png"), "test/test_human.json"),
    # One of two captions against itself gives 1000, against the other a little.
    "coco-caption": World(
        {}, tuple(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (391895, 60623)), "dataset_coco.json", 549.32
    ),
    "docvqa": World({}, ("documents/p1.png",), "val_v1.0_withQT.json"),
    "egoschema": World({}, ("videos/0074f737.mp4",), "questions.json"),
    "gqa": World({}, ("images/n1.jpg", "images/n2.jpg"), "testdev_balanced_questions.json"),
    "longvideobench": World({}, ("videos/86CxyhFV9MI.mp4", "videos/abc.mp4"), "lvb_val.json"),
    "mlvu": World({"split": "count"}, ("video/4_count/count_1.mp4",), "json/4_count.json"),
    "mmbench": World({}, (), "mmbench_dev_20230712.tsv"),
    "mme": World(
        {"split": "existence"},
        ("existence/images/000000006040.jpg",),
        "existence/questions_answers_YN/000000006040.txt",
        200.0,
    ),
    "mmmu": World(
        {},
        tuple(f"images/validation_{name}.png" for name in ("Art_1_1", "Art_2_1", "Art_2_2", "Math_1_1")),
        "Art/validation.jsonl",
    ),
    "msrvtt-qa": World({}, ("videos/video7010.mp4", "videos/video7011.mp4"), "test_qa.json"),
    "msvd-qa": World({}, ("videos/mv89psg6zh4_33_46.avi",), "test_a.json"),
    "mvbench": World({"split": "action_count"}, ("video/perception/videos/video_1.mp4",), "json/action_count.json"),
    "next-qa": World({}, ("NExTVideo/1104/4010069381.mp4", "NExTVideo/10057886514.mp4"), "test.csv"),
    "own": World({}, ("sign.png", "lamp.png", "clip.mp4"), "data.jsonl"),
    "pope": World({}, tuple(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (1, 2)), "coco_pope_popular.json"),
    "refcoco": World({"scale": "pixels"}, ("train2014/COCO_train2014_000000000009.jpg",), "refcoco_val.jsonl"),
    "scienceqa": World({}, tuple(f"images/test/{n}/image.png" for n in (11, 13)), "problems.json"),
    "seed": World({"split": "video"}, ("SEED-Bench-video-image/10_v10.png",), "SEED-Bench.json"),
    # In one of the two questions only three of ten people gave the first answer.
    "textvqa": World({}, ("train_images/aa01.jpg", "train_images/aa02.jpg"), "TextVQA_0.5.1_val.json", 95.0),
    "video-mme": World({}, ("data/fFjv93ACGo8.mp4", "data/zzzz.mp4"), "videomme/test.jsonl"),
    "vqav2": World(
        {},
        tuple(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (7, 12)),
        "v2_mscoco_val2014_annotations.json",
    ),
}


@pytest.fixture(params=WORLDS)
def asked(request: pytest.FixtureRequest, lay_out: LayOut) -> LocalTask:
    world = WORLDS[request.param]
    found = task(request.param, lay_out(request.param.replace("-", "_"), *world.media), **world.options)
    assert isinstance(found, LocalTask)
    return found


def test_every_data_set_in_a_folder_is_tested() -> None:
    assert {name for name in TASKS if issubclass(task_class(name), LocalTask)} == set(WORLDS)
    assert {name for name in WORLDS if task_class(name).name != name} == set()


def test_reading_twice_gives_the_same(asked: LocalTask) -> None:
    samples = list(asked.samples())
    names = [sample.sample_id for sample in samples]
    assert len(set(names)) == len(names) > 0
    again = [(sample.sample_id, sample.question, sample.answers) for sample in asked.samples()]
    assert again == [(sample.sample_id, sample.question, sample.answers) for sample in samples]
    shown = [bool(sample.images or sample.video or sample.frames) for sample in samples]
    assert all(shown) or asked.name == "own"
    assert all(sample.question.strip() and sample.answers for sample in samples)


def test_right_answers_score_best_and_empty_ones_nothing(asked: LocalTask) -> None:
    samples = list(asked.samples())
    best = [Outcome(sample, sample.answers[0], asked.score(sample, sample.answers[0])) for sample in samples]
    none = [Outcome(sample, "", asked.score(sample, "")) for sample in samples]
    assert [outcome.scored.score for outcome in none] == [0.0] * len(samples)
    figures, nothing = asked.summary(best), asked.summary(none)
    assert next(iter(figures)) == next(iter(nothing)) == asked.metric
    assert nothing[asked.metric] == 0.0
    key = "existence" if asked.name == "mme" else asked.metric
    assert figures[key] == pytest.approx(WORLDS[asked.name].best, rel=1e-6)
    assert asked.summary([]) == {}


def test_limit(asked: LocalTask) -> None:
    world = WORLDS[asked.name]
    first = list(task(asked.name, asked.root, **world.options, limit=1).samples())
    assert len({sample.cluster for sample in first} if asked.name == "mmbench" else first) == 1
    with pytest.raises(ValueError, match="limit=0: must be at least 1"):
        task(asked.name, **world.options, limit=0)


@pytest.mark.parametrize("name", WORLDS)
def test_missing_data_say_what_to_download_and_where_to_put_it(name: str, tmp_path: Path) -> None:
    kind = task_class(name)
    assert issubclass(kind, LocalTask)
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            list(task(name, root).samples())
        said = str(error.value)
        assert kind.source in said
        assert kind.layout[0].format(split=task(name).split) in said  # type: ignore[attr-defined]
        assert kind.export in said


@pytest.mark.parametrize("name", WORLDS)
def test_unknown_split(name: str) -> None:
    with pytest.raises(ValueError, match=r"split='tset': must be one of \w+"):
        task(name, split="tset")


def test_file_that_breaks_off_is_named(asked: LocalTask) -> None:
    assert asked.root is not None
    path = asked.root / WORLDS[asked.name].text
    text = path.read_text()
    path.write_text(text[: len(text.rstrip()) - 6])
    with pytest.raises(ValueError) as error:
        list(asked.samples())
    assert path.name in str(error.value)


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if world.media])
def test_missing_picture_or_video_is_named(name: str, lay_out: LayOut) -> None:
    world = WORLDS[name]
    root = lay_out(name.replace("-", "_"), *world.media)
    (root / world.media[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=Path(world.media[-1]).stem):
        list(task(name, root, **world.options).samples())


# Records as the exports on the Hugging Face hub have them, with the split's name there.
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chartqa": ("test.jsonl", {"type": "human_test", "question": "How many?", "answer": "4", "image": "x.png"}),
    "coco-caption": (
        "val.jsonl",
        {"question_id": "COCO_val2014_000000000001.jpg", "image": "x.png", "answer": ["A dog."], "id": 1},
    ),
    "docvqa": (
        "DocVQA/validation.jsonl",
        {"questionId": "1", "question": "Who?", "answers": ["me"], "image": "x.png", "docId": 3},
    ),
    "longvideobench": (
        "validation.jsonl",
        {
            "id": "a_0",
            "video_id": "a",
            "video_path": "clip.mp4",
            "question": "What?",
            "correct_choice": 1,
            "duration_group": 15,
            "option0": "x",
            "option1": "y",
            "option2": "N/A",
        },
    ),
    "mmbench": (
        "en/dev.jsonl",
        {
            "index": 4,
            "question": "What?",
            "hint": "nan",
            "A": "x",
            "B": "y",
            "C": "nan",
            "answer": "B",
            "category": "c",
            "image": {"bytes": None, "path": "x.png"},
        },
    ),
    "mme": (
        "test.jsonl",
        {
            "question_id": "OCR/1.jpg",
            "image": "x.png",
            "question": "Is it? Please answer yes or no.",
            "answer": "Yes",
            "category": "OCR",
        },
    ),
    "next-qa": (
        "MC/test.jsonl",
        {"video": 7, "question": "why", "answer": 2, "qid": 0, "type": "CW"} | {f"a{n}": f"o{n}" for n in range(5)},
    ),
    "egoschema": (
        "Subset/test.jsonl",
        {"video_idx": "7", "question": "why", "answer": "2", "option": [f"{c}. o" for c in "ABCDE"]},
    ),
    "pope": (
        "test.jsonl",
        {
            "question_id": "1",
            "question": "Is it?",
            "answer": "no",
            "image_source": "s",
            "image": "x.png",
            "category": "popular",
        },
    ),
    "refcoco": (
        "RefCOCO/val.jsonl",
        {"question_id": "1", "image": "x.png", "answer": ["left"], "bbox": [1.0, 1.0, 4.0, 4.0]},
    ),
    "scienceqa": (
        "test.jsonl",
        {"image": "x.png", "question": "What?", "choices": ["x", "y"], "answer": 1, "hint": "", "subject": "s"},
    ),
    "seed": (
        "test.jsonl",
        {"image": ["x.png"], "question_id": "1", "question": "What?", "answer": "D", "data_type": "image"}
        | {f"choice_{c}": c for c in "abcd"},
    ),
    "textvqa": (
        "data/validation.jsonl",
        {"image_id": "i", "question_id": 1, "question": "What?", "image": "x.png", "answers": ["x"] * 10},
    ),
    "vqav2": (
        "data/validation.jsonl",
        {"image_id": 1, "question_id": 1, "question": "What?", "image": "x.png", "answer_type": "other"}
        | {"answers": [{"answer": "x", "answer_id": n} for n in range(10)]},
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, tmp_path: Path, clip: Path) -> None:
    from PIL import Image

    path, record = EXPORTS[name]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(json.dumps(record) + "\n")
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    for video in ("clip.mp4", "7.mp4"):
        (tmp_path / video).write_bytes(clip.read_bytes())
    options = {"coco-caption": {"split": "val2014"}, "mme": {"split": "OCR"}, "refcoco": {"scale": "pixels"}}.get(
        name, {}
    )
    samples = list(task(name, tmp_path, **options).samples())
    assert {sample.cluster for sample in samples} == {samples[0].cluster}
    sample = samples[0]
    assert sample.images == (tmp_path / "x.png",) or sample.video is not None
    assert task(name, tmp_path, **options).score(sample, sample.answers[0]).score == (
        0.0 if name == "coco-caption" else 1.0
    )


def test_export_of_gqa_holds_pictures_apart(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    question = {"id": "5", "imageId": "n1", "question": "What?", "answer": "cup", "types": {"structural": "query"}}
    for config, record in (("images", {"id": "n1", "image": "x.png"}), ("instructions", question)):
        folder = tmp_path / f"testdev_balanced_{config}"
        folder.mkdir()
        (folder / "testdev-00000-of-00001.jsonl").write_text(json.dumps(record))
    (sample,) = task("gqa", tmp_path).samples()
    assert (sample.images, sample.category, sample.answers) == ((tmp_path / "x.png",), "open", ("cup",))


def test_parquet_export_holds_the_pictures(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from PIL import Image

    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    picture = {"bytes": (tmp_path / "x.png").read_bytes(), "path": "gone.png"}
    (tmp_path / "data").mkdir()
    records = [EXPORTS["textvqa"][1] | {"image": picture, "question_id": number} for number in range(3)]
    for part, some in enumerate((records[:2], records[2:])):
        parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f"data/validation-0000{part}-of-00002.parquet")
    samples = list(task("textvqa", tmp_path).samples())
    assert [sample.sample_id for sample in samples] == ["0", "1", "2"]
    assert all(isinstance(sample.images[0], Image.Image) and sample.images[0].size == (8, 6) for sample in samples)


# Data set -> file, record and the field with the options, where there can be any number of them.
LISTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "egoschema": ("Subset/test.jsonl", {"video_idx": "7"}, "option"),
    "longvideobench": ("lvb_val.json", {}, "candidates"),
    "mlvu": ("json/4_count.json", {"video": "7.mp4", "answer": "o0"}, "candidates"),
    "mmmu": ("validation.jsonl", {"id": "v_Art_1", "question_type": "multiple-choice", "answer": "A"}, "options"),
    "mvbench": ("json/action_count.json", {"video": "7.mp4", "answer": "o0"}, "candidates"),
    "own": ("data.jsonl", {"question": "?", "answer": "o0"}, "choices"),
    "scienceqa": ("test.jsonl", {"id": "1", "image": None}, "choices"),
    "video-mme": ("videomme/test.jsonl", {"duration": "short", "videoID": "7"}, "options"),
}


@pytest.mark.parametrize("name", LISTED)
def test_too_many_options_are_named_by_record(name: str, tmp_path: Path) -> None:
    file, record, field = LISTED[name]
    record = record | {field: [f"o{number}" for number in range(27)]}
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record] if path.suffix == ".json" else record) + "\n")
    options = WORLDS[name].options | ({"images_only": False} if name == "scienceqa" else {})
    place = f"{path}, record 1" if path.suffix == ".json" else f"{path}:1"
    with pytest.raises(ValueError, match=re.escape(f"{place}: choices: 27 given, must be 1 to 26")):
        list(task(name, tmp_path, **options).samples())


def test_options_that_cannot_be_scored_name_their_question() -> None:
    with pytest.raises(ValueError, match=r"^sample q7: choices: 0 given"):
        task("mlvu").score(Sample("q7", "?", ("A",)), "A")
