"""What is taught: files of conversations, good and bad, and how they become tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmfast
from mmfast.media import sample
from mmfast.training.conversations import Conversation, ConversationFile, WorldSource
from mmfast.training.objective import BadExample
from mmfast.training.settings import Settings
from mmfast.training.supervised import IGNORED, Supervised, encode
from mmfast.training.trainer import train

GOOD = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a star"}],
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return mmfast.load_default(dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    return tmp_path


def written(folder: Path, *entries: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def test_lines_and_lists_are_read(folder: Path) -> None:
    two = {**GOOD, "image": ["a.png", "a.png"]}
    source = ConversationFile(written(folder, GOOD, "", two))
    assert len(source) == 2
    found = {len(source.at(number).images): source.at(number) for number in range(2)}
    assert found[1].turns == (("what is it?", "a star"),)
    assert found[2].where.endswith("data.jsonl:3")
    (folder / "data.json").write_text(json.dumps([GOOD, two]))
    assert len(ConversationFile(folder / "data.json")) == 2


def test_lines_end_where_json_lines_do(folder: Path) -> None:
    said = [{"from": "human", "value": "one\u2028two\x85three?"}, {"from": "gpt", "value": "yes"}]
    path = folder / "data.jsonl"
    path.write_bytes((json.dumps({"conversations": said}, ensure_ascii=False) + "\r\n").encode())
    source = ConversationFile(path)
    assert len(source) == 1
    assert source.at(0).turns[0][0] == "one\u2028two\x85three?"


def test_clips_and_text_alone(folder: Path) -> None:
    talk = {"conversations": GOOD["conversations"]}
    clip = {**talk, "video": str(sample("bigbuckbunny.mp4"))}
    source = ConversationFile(written(folder, clip, talk), frames=3)
    assert sorted(len(source.at(number).frames) for number in range(2)) == [0, 3]


def test_every_pass_has_its_own_order(folder: Path) -> None:
    lines = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(20)]
    source = ConversationFile(written(folder, *lines))
    passes = [[source.at(turn * 20 + i).turns[0][0] for i in range(20)] for turn in range(2)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    assert passes[0] == [ConversationFile(folder / "data.jsonl").at(i).turns[0][0] for i in range(20)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{broken", r":1: no JSON"),
        ("[1]", r":1: an object is expected, got list"),
        ({"conversations": []}, r":1: 'conversations' must be a list that is not empty"),
        ({"conversations": GOOD["conversations"][:1]}, r":1: the last question has no answer"),
        ({"conversations": GOOD["conversations"][::-1]}, r":1: turn 1 must be a text from 'human'"),
        ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": " "}]}, r":1: turn 2 is empty"),
        ({**GOOD, "image": "none.png"}, r":1: .*none\.png"),
        ({**GOOD, "image": 3}, r":1: 'image' must be a path"),
        ({**GOOD, "video": "a.png"}, r":1: "),
    ],
)
def test_bad_entries_name_file_and_line(folder: Path, entry: Any, message: str) -> None:
    source = ConversationFile(written(folder, entry))
    with pytest.raises(BadExample, match=r"data\.jsonl" + message):
        source.at(0)


def test_bad_entries_are_skipped_when_asked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ConversationFile(written(folder, GOOD, "{broken", {**GOOD, "image": "none.png"}), on_bad="skip")
    with caplog.at_level(logging.WARNING):
        assert all(source.at(number).turns == (("what is it?", "a star"),) for number in range(6))
    assert sum("it is left out" in record.message for record in caplog.records) == 2


def test_no_good_entry_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="no entry can be used") as refused:
        ConversationFile(written(folder, "{broken"), on_bad="skip").at(0)
    # A run that leaves out bad examples must not leave out all of its steps.
    assert not isinstance(refused.value, BadExample)


def test_too_many_bad_entries_end_a_run_that_skips_them(loaded: tuple[Any, Any], folder: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")
    source = ConversationFile(written(folder, GOOD, *["{broken"] * 150), on_bad="skip")
    settings = Settings(steps=8, batch=16, on_bad="skip", log_every=1)
    supervised = Supervised(*loaded, source, trained="projector")
    with pytest.raises(ValueError, match="100 entries cannot be used"):
        train(supervised, settings, folder / "run", progress=False)
    assert not list((folder / "run").glob("*.safetensors"))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        ConversationFile(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no conversations"):
        ConversationFile(written(tmp_path, ""))


def test_the_world_takes_families_in_turn() -> None:
    source = WorldSource(families=["color", "size"])
    assert "size" in source.at(1).where
    assert "color" in source.at(2).where
    assert source.at(5).turns == WorldSource(families=["color", "size"]).at(5).turns
    assert len(WorldSource(3).at(0).frames) == 3


def test_clips_are_asked_which_way_something_moves() -> None:
    source = WorldSource(3, families=["exist", "direction"])
    assert [source.at(number).turns[0][1] in ("left", "right", "up", "down") for number in range(4)] == [
        False,
        True,
        False,
        True,
    ]
    assert all(len(source.at(number).turns) == 1 for number in range(4))


def test_several_questions_about_a_picture_are_about_different_objects() -> None:
    source = WorldSource(families=["color", "shape"], questions=6)
    lengths = []
    for number in range(12):
        turns = source.at(number).turns
        lengths.append(len(turns))
        assert len({question for question, _ in turns}) == len(turns)
        for question, answer in turns:
            # After "what color is the star? red" nobody asks what shape the red object has.
            assert not any(answer in other.rstrip("?").split() for other, _ in turns if other != question)
        assert turns[:1] == WorldSource(families=["color", "shape"]).at(number).turns
    assert 3 < max(lengths) <= 6
    assert source.at(3).turns == WorldSource(families=["color", "shape"], questions=6).at(3).turns


@pytest.mark.parametrize(("frames", "questions"), [(1, 0), (1, 33), (1, True), (4, 2)])
def test_a_number_of_questions_out_of_range_is_refused(frames: int, questions: int) -> None:
    with pytest.raises(ValueError, match="questions="):
        WorldSource(frames, questions=questions)


def pieces(taught: Any, processor: Any) -> Iterator[str]:
    """The runs of learned tokens, as text."""
    for row in taught.labels:
        run: list[int] = []
        for token in [*row.tolist(), IGNORED]:
            if token != IGNORED:
                run.append(token)
            elif run:
                yield processor.decode(run)
                run = []


def test_only_answers_are_learned(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    picture = Image.new("RGB", (32, 32))
    talks = [
        Conversation((("what color is the star?", "red"), ("is it small?", "yes")), images=(picture,)),
        Conversation((("is there a moon?", "no"),)),
    ]
    taught = encode(processor, talks)
    assert list(pieces(taught, processor)) == [" red</s>", " yes</s>", " no</s>"]
    # A token is learned where it stands, and what is learned is seen.
    learned = taught.labels != IGNORED
    assert torch.equal(taught.labels[learned], taught.inputs["input_ids"][learned])
    assert bool(taught.inputs["attention_mask"][learned].all())


def test_an_answer_of_the_letters_of_its_end_is_learned_whole(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    talk = Conversation((("which letter is it?", "s"), ("and now?", "s")))
    taught = encode(processor, [talk])
    whole = processor.apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for turn in talk.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    )
    assert list(pieces(taught, processor)) == [" s</s>", " s</s>"]
    assert processor.decode(taught.inputs["input_ids"][0]) == whole


@pytest.mark.parametrize(("written", "learned"), [("<end_of_turn>\n", "<end_of_turn>"), (" ", "</s>"), ("", "</s>")])
def test_an_answer_ends_as_the_template_closes_it(written: str, learned: str) -> None:
    _, processor = mmfast.load_default()
    processor.tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    assert "~ '</s>'" in processor.chat_template
    processor.chat_template = processor.chat_template.replace("~ '</s>'", f"~ {written!r}")
    taught = encode(processor, [Conversation((("is it small?", "yes"), ("is it red?", "no")))])
    assert list(pieces(taught, processor)) == [f" yes{learned}", f" no{learned}"]


def test_a_row_is_what_generate_would_have_written(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    source = WorldSource(families=["color"])
    supervised = Supervised(model, processor, source, trained="projector")
    batch = supervised.batch(0, 0, 1, 4)
    before = (batch.labels != IGNORED).int().argmax(dim=1)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    talks = [source.at(number) for number in range(4)]
    prompts = mmfast.adapters.prepare(processor, [t.turns[0][0] for t in talks], [list(t.images) for t in talks])
    answers = model.generate(**prompts, max_new_tokens=1, do_sample=False)[:, -1]
    assert logits[torch.arange(4), before - 1].argmax(dim=-1).tolist() == answers.tolist()


def test_rows_do_not_depend_on_their_neighbours(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    supervised = Supervised(model, processor, WorldSource(), trained="language")
    talks = [supervised.source.at(number) for number in range(3)]
    with torch.no_grad():
        every = supervised(encode(processor, talks), 0.0)
        counts = [int((encode(processor, [talk]).labels != IGNORED).sum()) for talk in talks]
        alone = [
            supervised(encode(processor, [talk]), 0.0).total * count for talk, count in zip(talks, counts, strict=True)
        ]
    torch.testing.assert_close(every.total, torch.stack(alone).sum() / sum(counts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("trained", "part"), [("language", "language_model"), ("projector", "projector")])
def test_only_what_is_named_is_trained(trained: Any, part: str) -> None:
    model, processor = mmfast.load_default(dtype="float32")
    supervised = Supervised(model, processor, WorldSource(), plan="uniform(keep=64)", trained=trained)
    supervised(supervised.batch(0, 0, 1, 2), 0.0).total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(part in name or "lm_head" in name for name in moved)


def test_other_words_are_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="trained='everything' must be one of"):
        Supervised(*loaded, WorldSource(), trained="everything")  # type: ignore[arg-type]
