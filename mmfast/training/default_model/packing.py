"""Many questions behind one picture: what the language model reads in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.training.default_model.world import PATCHES, Episode
from mmfast.training.objective import IGNORED


@dataclass(frozen=True)
class Packed:
    """A batch for the language model. R rows of S places.

    Attributes:
        ids: int64 ``[R, S]``; visual places hold 0.
        positions: int64 ``[R, S]``.
        visible: bool ``[R, 1, S, S]``, which place looks at which.
        targets: int64 ``[R, S]``, the token that follows, :data:`IGNORED` where nothing is to be learned.
        places: int64 ``[n, 2]``, row and place of every visual token of the batch.
        patches: int64 ``[n, 2]``, number of the frame in the batch, and the patch, of each of them.
        asked: int64 ``[q, 2]``, row and place at which the first token of an answer is foretold.
        owned: bool ``[q, S]``, the places of the objects that this answer depends on.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    targets: Tensor
    places: Tensor
    patches: Tensor
    asked: Tensor
    owned: Tensor

    def to(self, device: torch.device) -> Packed:
        """Return a copy on a device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass
class _Row:
    ids: list[int]
    positions: list[int]
    block: list[int]
    targets: list[int]
    visual: list[tuple[int, int, int]]
    asked: list[tuple[int, list[int]]]


class Packer:
    """Lays episodes out as the chat template of the model would.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._texts: dict[str, list[int]] = {}
        self.end = int(self._tokenizer.eos_token_id)

    def pack(
        self,
        episodes: Sequence[Episode],
        kept: Sequence[Sequence[np.ndarray]],
        *,
        compact: bool,
        questions: int,
        rng: np.random.Generator,
    ) -> Packed:
        """Lay out a batch.

        Args:
            episodes: pictures and clips, one row each.
            kept: per episode and frame the patches that are shown, ascending.
            compact: whether positions close up over dropped patches.
            questions: at most so many blocks per row.
            rng: chooses among the questions.
        """
        rows, frame = [], 0
        for episode, shown in zip(episodes, kept, strict=True):
            rows.append(self._row(episode, shown, frame, compact, questions, rng))
            frame += len(episode.scenes)
        return _padded(rows)

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text as the template writes it."""
        if text not in self._texts:
            message = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            written = self._processor.apply_chat_template(message, add_generation_prompt=False, tokenize=False)
            # Two tokens open every prompt; they stand before the pictures.
            self._texts[text] = self._tokenizer(written, add_special_tokens=False)["input_ids"][2:]
        return self._texts[text]

    def opening(self) -> list[int]:
        """Return the tokens before everything else."""
        message = [{"role": "user", "content": "x"}]
        written = self._processor.apply_chat_template(message, add_generation_prompt=False, tokenize=False)
        ids: list[int] = self._tokenizer(written, add_special_tokens=False)["input_ids"][:2]
        return ids

    def answer(self, text: str) -> list[int]:
        """Return the tokens of an answer with its end."""
        ids: list[int] = self._tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return [*ids, self.end]

    def _row(
        self,
        episode: Episode,
        kept: Sequence[np.ndarray],
        first_frame: int,
        compact: bool,
        questions: int,
        rng: np.random.Generator,
    ) -> _Row:
        row = _Row(list(self.opening()), [0, 1], [0, 0], [IGNORED, IGNORED], [], [])
        position = 2
        single = len(episode.scenes) == 1
        for frame, shown in enumerate(kept):
            if not single:
                position = _add_text(row, self.text(f"frame {frame + 1}:"), position)
            for order, patch in enumerate(shown):
                row.visual.append((len(row.ids), first_frame + frame, int(patch)))
                row.ids.append(0)
                row.positions.append(position + (order if compact else int(patch)))
                row.block.append(0)
                row.targets.append(IGNORED)
            position += len(shown) if compact else PATCHES
        prefix = len(row.ids)
        chosen = rng.permutation(len(episode.questions))[:questions]
        owners = [episode.owners[frame] for frame in range(len(kept))]
        for number, index in enumerate(chosen, start=1):
            question = episode.questions[index]
            prompt = [*self.text(question.text), self._assistant]
            answer = self.answer(question.answer)
            wanted = set(question.object_ids)
            mine = [place for place, frame, patch in row.visual if int(owners[frame - first_frame][patch]) in wanted]
            row.asked.append((len(row.ids) + len(prompt) - 1, mine))
            row.ids += [*prompt, *answer[:-1]]
            row.targets += [*[IGNORED] * (len(prompt) - 1), *answer]
            row.positions += range(position, position + len(prompt) + len(answer) - 1)
            row.block += [number] * (len(prompt) + len(answer) - 1)
        if prefix == len(row.ids):
            raise ValueError("an episode without questions cannot be packed")
        return row

    @property
    def _assistant(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids("<|assistant|>"))


def _add_text(row: _Row, ids: Sequence[int], position: int) -> int:
    row.ids += ids
    row.positions += range(position, position + len(ids))
    row.block += [0] * len(ids)
    row.targets += [IGNORED] * len(ids)
    return position + len(ids)


def _padded(rows: Sequence[_Row]) -> Packed:
    longest = max(len(row.ids) for row in rows)

    def table(columns: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*column, *[fill] * (longest - len(column))] for column in columns])

    # -1 is padding, which sees itself alone, so that no row of the attention is empty.
    block = table([row.block for row in rows], -1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None, :]
    visible = causal & (same | (block[:, None, :] == 0)) & (block[:, :, None] >= 0)
    visible |= torch.eye(longest, dtype=torch.bool)
    asked = [(r, place) for r, row in enumerate(rows) for place, _ in row.asked]
    owned = torch.zeros(len(asked), longest, dtype=torch.bool)
    for number, mine in enumerate(mine for row in rows for _, mine in row.asked):
        owned[number, mine] = True
    return Packed(
        ids=table([row.ids for row in rows], 0),
        positions=table([row.positions for row in rows], 0),
        visible=visible[:, None],
        targets=table([row.targets for row in rows], IGNORED),
        places=torch.tensor([(r, place) for r, row in enumerate(rows) for place, _, _ in row.visual]),
        patches=torch.tensor([(frame, patch) for row in rows for _, frame, patch in row.visual]),
        asked=torch.tensor(asked),
        owned=owned,
    )
