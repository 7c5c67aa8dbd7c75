"""Questions under two plans: what is seen while they are answered, and what cannot be."""

from __future__ import annotations

import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import mmfast
from mmfast.eval.datasets.shapes import render_clip
from mmfast.media import write_video
from mmfast.ui.session import MOST_FRAMES, MOST_NEW_TOKENS, Pane, Session, _Call

PLANS = ("full", "divprune(keep=64)")
QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(*mmfast.load_default())


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    picture = Image.new("RGB", (224, 224), "gray")
    ImageDraw.Draw(picture).ellipse((80, 80, 130, 130), fill="red")
    path = tmp_path_factory.mktemp("ui") / "circle.png"
    picture.save(path)
    return path


def last(session: Session, paths: list[Path], *plans: str, question: str = QUESTION, **values: int) -> tuple[Pane, ...]:
    return list(session.ask(paths, question, plans, **values))[-1]


def test_both_plans_answer_one_after_the_other(session: Session, circle: Path) -> None:
    steps = list(session.ask([circle], QUESTION, PLANS))
    assert [pane.answer for pane in steps[-1]] == ["red", "red"]
    assert not any(pane.failed or pane.note for pane in steps[-1])
    # The second waits until the first is complete, and each is seen to grow.
    assert all(right.note == "waiting" for left, right in steps if not left.figures)
    assert [left.note for left, _ in steps][:2] == ["running", "running"]
    assert any(right.note == "running" and left.figures for left, right in steps)
    assert dict(steps[-1][1].figures)["visual tokens into the LLM"] == "64 of 256"
    assert [len(pane.drawings) for pane in steps[-1]] == [1, 1]
    assert steps[-1][0].time_line == ""


def test_the_model_is_left_without_a_plan(session: Session, circle: Path) -> None:
    last(session, [circle], "divprune(keep=64)")
    with mmfast.accelerate(session.model, "full") as fast:
        assert fast.active


def test_a_clip_has_a_time_line_and_its_frames_drawn(session: Session, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", list(render_clip(3, num_frames=8).frames), fps=8)
    (pane,) = last(session, [tmp_path / "clip.mp4"], "divprune(keep=16)", frames=3)
    assert pane.drawings[0].caption == "0.0 s"
    assert len(pane.drawings) == 3
    assert pane.time_line.count("<title>") == 3
    assert dict(pane.figures)["visual tokens into the LLM"] == "48 of 768"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("divprun(keep=3)", "unknown method 'divprun'; did you mean divprune"),
        ("divprune(keep=-3)", "keep=-3"),
        ("import os", "import os"),
        # A path is not read: whoever types it may not be the one whose files these are.
        ("secret.toml", "secret"),
        ("x" * 2000, "a plan may have 1000 characters, got 2000"),
        ("assistant(plan='full')", "draft_model"),
    ],
)
def test_a_plan_that_cannot_run_is_one_line_and_the_other_answers(
    session: Session, circle: Path, plan: str, message: str
) -> None:
    wrong, right = last(session, [circle], plan, "divprune(keep=64)")
    assert wrong.failed
    assert message in wrong.note
    assert "\n" not in wrong.note
    assert not wrong.note.startswith("unexpected")
    assert (right.answer, right.failed) == ("red", False)


def huge_png(path: Path) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    return path


def test_media_that_cannot_be_used_are_one_line(session: Session, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video\n")
    for path, message in ((tmp_path / "text.mp4", "text.mp4"), (huge_png(tmp_path / "huge.png"), "30000x30000 pixels")):
        panes = last(session, [path], *PLANS)
        assert all(pane.failed and message in pane.note and "\n" not in pane.note for pane in panes)
        # Where the server keeps an upload is nobody's business.
        assert not any(str(tmp_path) in pane.note for pane in panes)
        assert not any(pane.answer for pane in panes)


@pytest.mark.parametrize(
    ("question", "values", "message"),
    [
        ("  ", {}, "the question is empty"),
        ("x" * 5000, {}, "question must be 1 to 4000 characters, got 5000"),
        (QUESTION, {"frames": MOST_FRAMES + 1}, f"frames must be 1 to {MOST_FRAMES}"),
        (QUESTION, {"max_new_tokens": MOST_NEW_TOKENS + 1}, f"max_new_tokens must be 1 to {MOST_NEW_TOKENS}"),
    ],
)
def test_what_is_out_of_range_is_said(
    session: Session, circle: Path, question: str, values: dict[str, int], message: str
) -> None:
    (pane,) = last(session, [circle], "full", question=question, **values)
    assert pane.failed
    assert message in pane.note


def test_nothing_uploaded_is_said(session: Session) -> None:
    (pane,) = last(session, [], "full")
    assert "choose images, or one video" in pane.note


def test_questions_at_the_same_time_take_turns(session: Session, circle: Path) -> None:
    found: list[tuple[Pane, ...]] = []

    def ask() -> None:
        found.append(last(session, [circle], *PLANS))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Two plans at once on one model would be refused.
    assert [[pane.answer for pane in panes] for panes in found] == [["red", "red"]] * 3
    assert not any(pane.failed for panes in found for pane in panes)


def test_an_answer_that_nobody_waits_for_is_broken_off(
    session: Session, circle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    put = _Call.put

    def counted(self: _Call, value: Any) -> None:
        given.append(value.numel())
        put(self, value)

    monkeypatch.setattr(_Call, "put", counted)
    # Without an end token the answer takes all the tokens it may have.
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", None)
    steps = session.ask([circle], QUESTION, ["divprune(keep=16)"], max_new_tokens=MOST_NEW_TOKENS)
    next(steps)
    next(steps)
    steps.close()
    assert len(given) < MOST_NEW_TOKENS / 2
    assert not session._lock.locked()
    with mmfast.accelerate(session.model, "full"):
        pass
