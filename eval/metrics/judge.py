"""Answers judged by a language model, as open video questions are since Video-ChatGPT (Maaz et al., 2023).

Judges differ by points: scores compare only under the same judge, and never with :func:`~.text.exact` or
:func:`~.text.contains`. A judge is any callable from a request to its reply, so a local model serves as well
as a service; or requests are written to a file, judged elsewhere, and the replies read back.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_BEST = 5.0

_SYSTEM = (
    "You compare the answer that a model gave to a question about a video with the correct answer, and decide "
    "whether both mean the same. Synonyms and paraphrases count as the same."
)
_USER = (
    "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n\n"
    "Reply with nothing but a Python dictionary with two keys: 'pred', the string 'yes' if the prediction is right "
    "and 'no' if it is not, and 'score', an integer from 0 to 5, 5 for the closest match. "
    "For example: {{'pred': 'yes', 'score': 4}}"
)


@dataclass(frozen=True)
class Request:
    """What a judge is asked.

    Attributes:
        sample_id: whose answer it is.
        question: the question, without prompt tail.
        answer: the expected answer.
        prediction: the model's raw text.
    """

    sample_id: str
    question: str
    answer: str
    prediction: str

    def messages(self) -> list[dict[str, str]]:
        """Write the request as a chat.

        Example:
            >>> [message["role"] for message in Request("1", "what is it", "a cat", "kitten").messages()]
            ['system', 'user']
        """
        asked = _USER.format(question=self.question, answer=self.answer, prediction=self.prediction)
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]


@dataclass(frozen=True)
class Verdict:
    """What a judge said.

    Attributes:
        right: whether the prediction means the answer.
        score: 0 to 5.
    """

    right: bool
    score: float


class Judge(Protocol):
    """Any callable that answers a request with the raw reply of a language model."""

    def __call__(self, request: Request) -> str:
        """Return the reply."""
        ...


def read_verdict(reply: str) -> Verdict | None:
    """Read a reply.

    Args:
        reply: a dictionary as Python or JSON writes it, possibly within other text.

    Returns:
        The verdict, or None where the reply is none, which the caller counts: published tools ask again or
        leave the question out, which changes what the accuracy is a share of.

    Example:
        >>> read_verdict("{'pred': 'yes', 'score': 4}")
        Verdict(right=True, score=4.0)
        >>> read_verdict('Sure: {"pred": "no", "score": "1"}')
        Verdict(right=False, score=1.0)
        >>> read_verdict("I think so")
    """
    start, end = reply.find("{"), reply.find("}")
    if not 0 <= start < end:
        return None
    try:
        found = ast.literal_eval(reply[start : end + 1])
        said, score = str(found["pred"]).strip().lower(), float(found["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return None
    if said not in ("yes", "no") or not 0 <= score <= _BEST:
        return None
    return Verdict(said == "yes", score)


def write_requests(requests: Iterable[Request], path: Path) -> int:
    """Write requests to a JSONL file: one object per line with ``sample_id`` and ``messages``.

    Returns:
        How many were written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_requests([Request("1", "what is it", "a cat", "kitten")], Path(folder) / "requests.jsonl")
        1
    """
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            line = {"sample_id": request.sample_id, "messages": request.messages()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
    return written


def read_replies(path: Path) -> Mapping[str, str]:
    """Read the replies to a file of requests.

    Args:
        path: JSONL with ``sample_id`` and ``reply`` in each line; a later line replaces an earlier one.

    Returns:
        The raw reply to each sample.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of one that cannot be read.
    """
    replies: dict[str, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                replies[str(found["sample_id"])] = str(found["reply"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}:{number}: must be an object with sample_id and reply") from None
    return replies
