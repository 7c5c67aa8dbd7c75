"""The embedded model loads without network or noise and knows its world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets import Shapes, score
from mmfast.zoo import EMBEDDED_VOCO, default_path, embedded_name, load_default

DATA = Path(mmfast.__file__).parent / "data"


@pytest.fixture(scope="module")
def default() -> tuple[Any, Any]:
    return load_default()


def answers(default: tuple[Any, Any], questions: list[str], images: Any = None, frames: Any = None) -> list[str]:
    model, processor = default
    inputs = prepare(processor, questions, images, frames)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_the_shipped_scenes(default: tuple[Any, Any]) -> None:
    folder = DATA / "samples" / "scenes"
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert {row["family"] for row in rows} == {"exist", "color", "shape", "size", "where", "read"}
    assert {row["image"] for row in rows} == {path.name for path in folder.glob("*.png")}
    got = answers(default, [row["question"] for row in rows], [Image.open(folder / row["image"]) for row in rows])
    wrong = [(row, text) for row, text in zip(rows, got, strict=True) if not score(text, row["answer"])]
    # Reading is what it still gets wrong now and then.
    assert [row["question"] for row, _ in wrong if row["family"] != "read"] == []
    assert len(wrong) <= 1


def test_knows_the_rendered_world(default: tuple[Any, Any]) -> None:
    # All six kinds; it gets 96 of 100 right, and chance is about 1 in 4.
    records = list(Shapes(num_questions=60))
    got = answers(default, [r.question for r in records], [r.image for r in records])
    assert sum(score(text, r.answer) for text, r in zip(got, records, strict=True)) >= 55


@pytest.mark.parametrize("num_frames", [2, 4, 6])
def test_answers_clips(default: tuple[Any, Any], num_frames: int) -> None:
    records = list(Shapes(num_frames=num_frames, num_questions=24))
    got = answers(default, [r.question for r in records], frames=[r.frames for r in records])
    assert sum(score(text, r.answer) for text, r in zip(got, records, strict=True)) >= 22


def test_a_batch_answers_as_one_by_one(default: tuple[Any, Any]) -> None:
    records = list(Shapes(seed=2, num_questions=6))
    together = answers(default, [r.question for r in records], [r.image for r in records])
    assert together == [answers(default, [r.question], [r.image])[0] for r in records]


@pytest.mark.parametrize(
    "question",
    [
        "is there an orange star?",
        "Is there an orange star ?",
        "IS THERE A ORANGE STAR?",
        "  is there an orange star?\n",
    ],
)
def test_template_brings_questions_into_the_trained_form(default: tuple[Any, Any], question: str) -> None:
    _, processor = default
    messages = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s><|user|><image>is there a orange star?<|assistant|>"


def test_template_keeps_several_pictures_and_turns_in_order(default: tuple[Any, Any]) -> None:
    _, processor = default
    messages = [
        {"role": "user", "content": [*[{"type": "text", "text": "frame 1:"}, {"type": "image"}] * 2]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "what color is the ring ?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<s><|user|>frame 1:<image>frame 1:<image><|assistant|> yes</s><|user|>what color is the ring?<|assistant|>"
    )


def test_model_is_ready_to_generate(default: tuple[Any, Any]) -> None:
    model, processor = default
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert processor.tokenizer.padding_side == "left"
    assert load_default(dtype="bfloat16", attn_implementation="eager")[0].dtype is torch.bfloat16


def test_loads_in_silence(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    model, processor = load_default()
    inputs = prepare(processor, "is there a star?", Image.new("RGB", (224, 224)))
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_compression_tokens_carry_the_picture() -> None:
    model, processor = load_default(EMBEDDED_VOCO)
    records = list(Shapes(families=["color", "shape"], num_questions=40))
    questions, images = [r.question for r in records], [r.image for r in records]
    right = []
    with mmfast.accelerate(model, "voco()") as fast:
        for shown in (images, images[20:] + images[:20]):
            got = answers((model, processor), questions, shown)
            right.append(sum(score(text, r.answer) for text, r in zip(got, records, strict=True)))
        # Of each picture sixteen entries stay in the cache.
        assert fast.report().kv_bytes < 0.1 * fast.report().full_kv_bytes
    # Of 40 it has all right, and 5 where each question is shown the picture of another.
    assert right[0] >= 38 > 9 >= right[1]


def test_the_calibrations_are_plans() -> None:
    model, _ = load_default()
    found = sorted((default_path() / "calibrations").glob("*.toml"))
    assert [path.stem for path in found] == ["fitprune", "shortv", "vtw"]
    for path in found:
        with mmfast.accelerate(model, path):
            pass


def test_names_of_embedded_models() -> None:
    with pytest.raises(ValueError, match="name='embeded' is no embedded model; there are 'embedded', 'embedded-voco'"):
        load_default("embeded")
    assert embedded_name(default_path(EMBEDDED_VOCO)) == EMBEDDED_VOCO


def test_package_data_is_small() -> None:
    sizes = {path: path.stat().st_size for path in DATA.rglob("*") if path.is_file()}
    assert sizes[default_path() / "model.safetensors"] > 4_000_000
    assert sum(sizes.values()) < 25_000_000
    assert not [path for path in default_path().iterdir() if path.suffix in (".bin", ".py", ".pt", ".pkl")]
