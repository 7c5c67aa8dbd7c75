"""ReKV: whole frames, chosen once by the question."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step, rotate
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from support.entries import rotary


def prompt(wanted: int, question: int = 2) -> Entries:
    """Two tokens of text, five frames of three tokens, and a question that asks for one of the frames."""
    length = 17 + question
    frame = torch.tensor([-1, -1, *torch.arange(5).repeat_interleave(3), *[-1] * question])
    bare = torch.eye(8)[frame.clamp(min=0)].repeat(2, 1, 1) * (frame >= 0)[:, None]
    queries = torch.zeros(4, length, 8)
    queries[:, length - max(1, question) :] = torch.eye(8)[wanted]
    rotation = rotary(length, 8, 100.0)
    keys = rotate(bare, rotation.cos, rotation.sin)
    view = AttentionView(rotate(queries, rotation.cos, rotation.sin), keys)
    visual = frame >= 0
    return Entries.of(keys, keys, visual=visual, frame=frame, attention=view, rotation=rotation)


@pytest.mark.parametrize("wanted", range(5))
def test_the_question_finds_its_frame_wherever_it_stands(wanted: int) -> None:
    entries = prompt(wanted)
    method = get("rekv").method(keep=8, dense_layers=0)
    method.prepare(entries)
    keys = torch.cat([entries.keys, entries.keys[:, :1]], dim=1)
    # The query of the step asks for nothing: the question has chosen.
    chosen = method.choose(Step(keys, keys, torch.zeros(4, 1, 8), seen=20, memory=entries.memory))
    first = 2 + 3 * wanted
    assert chosen.nonzero().squeeze(-1).tolist() == [0, 1, first, first + 1, first + 2, 17, 18, 19]


def test_where_nothing_follows_the_video_its_last_token_asks() -> None:
    entries = prompt(3, question=0)
    method = get("rekv").method(keep=5, dense_layers=0)
    method.prepare(entries)
    assert entries.memory["chosen"].nonzero().squeeze(-1).tolist() == [0, 1, 11, 12, 13]


def test_frames_are_never_cut_and_one_is_always_read() -> None:
    for keep, frames in ((1, 1), (6, 1), (9, 1), (10, 2), (12, 2), (13, 3)):
        entries = prompt(4)
        get("rekv").method(keep=keep, dense_layers=0).prepare(entries)
        assert entries.memory["chosen"].sum() == 4 + 3 * frames
    entries = prompt(4)
    get("rekv").method(keep=10, chunk=2, dense_layers=0).prepare(entries)
    # The last chunk has one frame only, and a second chunk does not fit beside it.
    assert entries.memory["chosen"].nonzero().squeeze(-1).tolist() == [0, 1, 14, 15, 16, 17, 18]


def test_a_prompt_of_text_is_read_as_a_whole() -> None:
    zeros = torch.zeros(1, 9, 8)
    entries = Entries.of(zeros, zeros, zeros)
    method = get("rekv").method(keep=2, dense_layers=0)
    method.prepare(entries)
    assert method.choose(Step(zeros, zeros, zeros[:, :1], seen=9, memory=entries.memory)) is None


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        get("rekv").method(chunk=0)
