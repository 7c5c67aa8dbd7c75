"""What a model is taught: conversations about pictures and clips, from a file or from the rendered world."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmfast.eval.datasets.shapes import Record, Shapes, ask
from mmfast.media import MediaError, load_image, read_video
from mmfast.training.objective import BadExample

logger = logging.getLogger(__name__)

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PLACEHOLDERS = ("<image>", "<video>")
_MOST_BAD = 100
_MOST_QUESTIONS = 32


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about the same media.

    Attributes:
        turns: pairs of question and answer.
        images: pictures that stand before the first question.
        frames: frames of a clip that stands there.
        where: file and line, for messages.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    where: str = ""


class Source(ABC):
    """An endless row of conversations, the same each time it is read.

    Attributes:
        seed: of its order, and of what else a run draws for each step.
    """

    seed: int = 0

    @abstractmethod
    def at(self, number: int) -> Conversation:
        """Return the conversation of a number, from 0.

        Raises:
            BadExample: if it cannot be used and bad ones are not skipped.
        """


class ConversationFile(Source):
    """Conversations in the format of LLaVA: ``.jsonl`` with an object per line, or ``.json`` with a list of them.

    An object has ``conversations``, a list of ``{"from": "human" | "gpt", "value": text}`` in turn, and may have
    ``image`` (a path or several) or ``video`` (a path), relative to ``media``. Each pass over the file has an order
    of its own.

    Args:
        path: a ``.jsonl`` or ``.json`` file.
        media: folder of the pictures and clips; None takes that of the file.
        frames: frames taken from a clip.
        seed: of the order.
        on_bad: ``"stop"`` at the first entry that cannot be used, or ``"skip"`` it with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds nothing.
    """

    def __init__(
        self,
        path: str | Path,
        media: str | Path | None = None,
        *,
        frames: int = 8,
        seed: int = 0,
        on_bad: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is no file; give a .jsonl or .json file of conversations")
        self.media = self.path.parent if media is None else Path(media)
        self.frames, self.seed, self.on_bad = frames, seed, on_bad
        self._entries = self._read()
        if not self._entries:
            raise ValueError(f"{self.path} holds no conversations")
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def at(self, number: int) -> Conversation:
        """Return the conversation of a number; after a bad one comes the next good one of the same pass.

        Raises:
            BadExample: if it cannot be used and bad ones are not skipped.
            ValueError: if too many, or all, cannot be used.
        """
        turn, place = divmod(number, len(self._entries))
        entries = order(self.seed, turn, len(self._entries))
        for step in range(len(entries)):
            index = int(entries[(place + step) % len(entries)])
            if index in self._bad:
                continue
            try:
                return self._conversation(index)
            except BadExample as error:
                if self.on_bad == "stop":
                    raise
                self._bad.add(index)
                logger.warning("%s; it is left out", error)
                if len(self._bad) >= _MOST_BAD:
                    # No BadExample: a run that skips those would skip every step from here on.
                    raise ValueError(
                        f"{self.path}: {_MOST_BAD} entries cannot be used, the last one: {error}"
                    ) from None
        raise ValueError(f"{self.path}: no entry can be used")

    def _read(self) -> list[tuple[int, str]]:
        """Return line number and text of each entry."""
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".json":
            try:
                entries = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{self.path} is no JSON: {error}") from None
            if not isinstance(entries, list):
                raise ValueError(f"{self.path} must hold a list of conversations, got {type(entries).__name__}")
            return [(number, json.dumps(entry)) for number, entry in enumerate(entries, start=1)]
        # Not splitlines(): JSON may hold other separators of lines inside a text.
        return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]

    def _conversation(self, index: int) -> Conversation:
        number, text = self._entries[index]
        where = f"{self.path}:{number}"
        try:
            entry = json.loads(text)
        except ValueError as error:
            raise BadExample(f"{where}: no JSON ({error})") from None
        if not isinstance(entry, dict):
            raise BadExample(f"{where}: an object is expected, got {type(entry).__name__}")
        turns = _turns(entry.get("conversations"), where)
        try:
            images = tuple(load_image(self.media / name) for name in _names(entry, "image", where))
            clips = [read_video(self.media / n, num_frames=self.frames) for n in _names(entry, "video", where)]
        except (OSError, MediaError) as error:
            raise BadExample(f"{where}: {error}") from None
        if len(clips) > 1:
            raise BadExample(f"{where}: one video at most, got {len(clips)}")
        return Conversation(turns, images, tuple(clips[0].images()) if clips else (), where)


class WorldSource(Source):
    """Questions about the rendered world.

    Args:
        num_frames: 1 for pictures, more for clips.
        families: as in :class:`mmfast.eval.Shapes`.
        seed: which part of the training split.
        questions: asked of each picture at most, one after the other; no two about the same object, so that an answer
            cannot be read off an earlier one. Clips are asked one question.

    Raises:
        ValueError: for an unknown family, or several questions about clips.

    Example:
        >>> WorldSource(families=["color"]).at(3).turns[0][1] in ("red", "green", "blue", "yellow", "purple", "orange",
        ...     "cyan", "white")
        True
    """

    def __init__(
        self, num_frames: int = 1, families: Sequence[str] | None = None, seed: int = 0, *, questions: int = 1
    ) -> None:
        most = _MOST_QUESTIONS if num_frames == 1 else 1
        if isinstance(questions, bool) or not 1 <= questions <= most:
            raise ValueError(f"questions={questions!r} must be an int from 1 to {most} where num_frames={num_frames}")
        self.num_frames, self.seed, self.questions = num_frames, seed, questions
        self.families = tuple(Shapes(families=families, num_frames=num_frames).families or ())

    def at(self, number: int) -> Conversation:
        """Draw the conversation of a number; the families take turns."""
        # A data set per number: any of them can be drawn without those before it.
        drawn = Shapes(
            split="train",
            seed=self.seed * 1_000_000_007 + number,
            families=[self.families[number % len(self.families)]],
            num_questions=1,
            num_frames=self.num_frames,
        )
        record = next(iter(drawn))
        turns = ((record.question, record.answer), *self._more(record, number))
        return _about(record, turns)

    def held_out(self, count: int) -> list[Conversation]:
        """Return questions of the held-out split, which shares no scene with what is taught."""
        drawn = Shapes("heldout", self.seed, self.families, num_questions=count, num_frames=self.num_frames)
        return [_about(record, ((record.question, record.answer),)) for record in drawn]

    def _more(self, record: Record, number: int) -> Iterator[tuple[str, str]]:
        """Ask about the objects of a picture that nobody has asked about yet."""
        if self.questions == 1:
            # Some families are for clips alone, and one scene does not show what happens in a clip.
            return
        rng = np.random.default_rng([self.seed, number])
        taken, asked = set(record.object_ids), {record.question}
        for _ in range(2 * self.questions):
            for question in ask(record.scene, rng, self.families):
                # A question that depends on no object says what is not there: that gives nothing away either.
                fresh = question.text not in asked and taken.isdisjoint(question.object_ids)
                if fresh and len(asked) < self.questions:
                    taken |= set(question.object_ids)
                    asked.add(question.text)
                    yield question.text, question.answer


def _about(record: Record, turns: tuple[tuple[str, str], ...]) -> Conversation:
    clip = len(record.frames) > 1
    shown = {"frames" if clip else "images": record.frames}
    return Conversation(turns, **shown, where=record.question_id)


@lru_cache(maxsize=8)
def order(seed: int, turn: int, count: int) -> np.ndarray[Any, Any]:
    """Return the order of one pass over so many entries, int64 ``[count]``.

    Example:
        >>> order(0, 0, 3).tolist() == order(0, 0, 3).tolist()
        True
    """
    return np.random.default_rng([seed, turn]).permutation(count)


def _turns(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadExample(f"{where}: 'conversations' must be a list that is not empty")
    said: list[str] = []
    for place, entry in enumerate(value):
        speaker = _SPEAKERS.get(str(entry.get("from", entry.get("role")))) if isinstance(entry, dict) else None
        text = entry.get("value", entry.get("content")) if isinstance(entry, dict) else None
        if speaker != ("user", "assistant")[place % 2] or not isinstance(text, str):
            raise BadExample(f"{where}: turn {place + 1} must be a text from {('human', 'gpt')[place % 2]!r}")
        for placeholder in _PLACEHOLDERS:
            text = text.replace(placeholder, "")
        if not text.strip():
            raise BadExample(f"{where}: turn {place + 1} is empty")
        said.append(text.strip())
    if len(said) % 2:
        raise BadExample(f"{where}: the last question has no answer")
    return tuple(zip(said[::2], said[1::2], strict=True))


def _names(entry: dict[str, Any], key: str, where: str) -> list[str]:
    value = entry.get(key)
    if value is None:
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise BadExample(f"{where}: {key!r} must be a path or a list of paths")
    return names
