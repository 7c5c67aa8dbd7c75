"""Questions that a draft head is tried on: none of those that it has learned from."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import mmfast
from mmfast.training.conversations import ConversationFile, WorldSource, order
from mmfast.training.draft_heads.evaluation import held_out
from mmfast.training.draft_heads.objective import DraftHead
from mmfast.training.draft_heads.options import HeadOptions
from mmfast.training.objective import BadExample

OPTIONS = HeadOptions(prompts=8, new_tokens=8, together=4, held_out=0)


def test_a_file_of_questions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Held-out questions are others than those that are trained on; what cannot be used is named or left out."""
    path = tmp_path / "asked.jsonl"
    turns = [{"from": "human", "value": "what color is it?"}, {"from": "gpt", "value": "-"}]
    lines = [json.dumps({"conversations": turns}) for _ in range(6)]
    path.write_text("\n".join([*lines[:5], "{", lines[5]]))
    source = ConversationFile(path, on_bad="skip")
    options = replace(OPTIONS, prompts=4, held_out=3)
    with caplog.at_level(logging.WARNING):
        asked = [conversation.where for conversation in held_out(source, options)]
        taught_on = {source.at(number).where for number in range(4)}
    assert "no JSON" in caplog.text
    assert len(asked) == len(set(asked)) >= 2
    assert not taught_on & set(asked)
    with pytest.raises(
        ValueError, match=r"prompts=4 and held_out=4 are more than the 7 conversations of .*asked.jsonl"
    ):
        DraftHead(*mmfast.load_default(), source, replace(options, held_out=4))
    strict = DraftHead(*mmfast.load_default(), ConversationFile(path), replace(OPTIONS, prompts=7))
    with pytest.raises(BadExample, match=r"asked.jsonl:6: no JSON"):
        strict.begin(tmp_path, 0, 1)


def test_questions_of_the_world_are_held_out() -> None:
    asked = held_out(WorldSource(families=["color"]), replace(OPTIONS, held_out=3))
    assert [conversation.where.split("/")[1] for conversation in asked] == ["heldout"] * 3
    assert all(len(conversation.images) == 1 for conversation in asked)
    clips = held_out(WorldSource(2, ["color"]), replace(OPTIONS, held_out=1))
    assert (len(clips[0].frames), clips[0].images) == (2, ())


@pytest.mark.parametrize("bad", [[9], [8, 9], [7, 8, 9], [0, 9], [0, 7, 8], [3, 4]], ids=str)
def test_no_conversation_that_was_trained_on_is_held_out(tmp_path: Path, bad: Sequence[int]) -> None:
    turns = [{"from": "human", "value": "what color is it?"}, {"from": "gpt", "value": "-"}]
    lines = [json.dumps({"conversations": turns})] * 10
    for place in bad:
        lines[order(0, 0, 10)[place]] = "{"
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(lines))
    source = ConversationFile(path, on_bad="skip")
    asked = [conversation.where for conversation in held_out(source, replace(OPTIONS, held_out=2))]
    assert not {source.at(number).where for number in range(8)} & set(asked)
    assert len(asked) == len(set(asked)) == (2 if bad == [3, 4] else 1 if bad in ([9], [0, 9]) else 0)
