"""Judged answers: what is asked, what replies are read, and the two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfast.eval.metrics import Judge, Request, Verdict, read_replies, read_verdict, write_requests

REQUEST = Request("v1/0", "what is the man doing", "cooking", "He cooks {soup}.")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", Verdict(True, 4.0)),
        ('{"pred": "No", "score": 0}', Verdict(False, 0.0)),
        ("Here you are: {'pred': 'yes', 'score': 4.8}. Bye!", Verdict(True, 4.8)),
        ("{'pred': 'yes', 'score': '3'}", Verdict(True, 3.0)),
        ("{'pred': 'perhaps', 'score': 3}", None),
        ("{'pred': 'yes', 'score': 6}", None),
        ("{'pred': 'yes', 'score': float('nan')}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred', 'score'}", None),
        ("} yes {", None),
        ("yes", None),
        ("{" + "(" * 10_000 + "}", None),
        ("{__import__('os').getcwd()}", None),
    ],
)
def test_replies(reply: str, verdict: Verdict | None) -> None:
    assert read_verdict(reply) == verdict


def test_request_holds_all_that_is_judged() -> None:
    text = " ".join(message["content"] for message in REQUEST.messages())
    assert all(part in text for part in (REQUEST.question, REQUEST.answer, REQUEST.prediction))
    assert "'pred'" in text
    assert "'score'" in text


def test_requests_go_out_and_replies_come_back(tmp_path: Path) -> None:
    judge: Judge = lambda request: f"{{'pred': 'yes', 'score': {len(request.answer) - 4}}}"  # noqa: E731
    assert write_requests([REQUEST], tmp_path / "requests.jsonl") == 1
    (line,) = (tmp_path / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    asked = json.loads(line)
    assert asked["messages"] == REQUEST.messages()
    reply = {"sample_id": asked["sample_id"], "reply": judge(REQUEST)}
    (tmp_path / "replies.jsonl").write_text(json.dumps(reply) + "\n\n")
    replies = read_replies(tmp_path / "replies.jsonl")
    assert read_verdict(replies["v1/0"]) == Verdict(True, 3.0)


@pytest.mark.parametrize("line", ["{", "[]", '{"sample_id": "1"}'])
def test_bad_line_of_replies_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "replies.jsonl").write_text(f'{{"sample_id": "1", "reply": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"replies.jsonl:2: must be an object with sample_id and reply"):
        read_replies(tmp_path / "replies.jsonl")
