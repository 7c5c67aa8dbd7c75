"""From logits to tokens, one after the other, as ``generate`` does without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from mmfast.adapters.own_loop import Written

_WITHOUT_MEMORY = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)


def _of_row(processor: Any, row: int) -> Any:
    """Return a processor that knows how long the padding of each row is for one row alone."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or ignored.shape[0] == 1:
        return processor
    own = copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


class AnswerSampler:
    """Processors, choice, stopping and streaming of one call of ``generate``.

    Processors and criteria are called once for every token that is given out, with the answer up to there, so
    that those with a memory see what they would see without drafts. Chance is drawn per token of the answer and
    in its order, as :func:`torch.multinomial` does for a whole batch: the same seed gives the same answer.

    Args:
        ids: ``[B, S]`` int64 prompt as ``generate`` has it.
        config: the generation config.
        processors: list of logits processors.
        criteria: list of stopping criteria.
        streamer: takes tokens as they come, or None.
        excluded: tokens that drafters do not draft.
    """

    def __init__(
        self,
        ids: Tensor,
        config: Any,
        processors: Any,
        criteria: Any,
        streamer: Any,
        excluded: frozenset[int] = frozenset(),
    ) -> None:
        self.excluded = excluded
        batch, self._prompt = ids.shape
        self._limit = int(config.max_length)
        room = max(self._limit, self._prompt + 1)
        self._ids = torch.cat([ids, ids.new_zeros(batch, room - self._prompt)], dim=1)
        self._lengths = [self._prompt] * batch
        self._processors = [[_of_row(processor, row) for processor in processors] for row in range(batch)]
        self._sampling, self._streamer = bool(config.do_sample), streamer
        padding = config._pad_token_tensor
        self._padding = None if padding is None else int(padding)
        self._stops: set[int] = set()
        self._criteria = []
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._stops |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self._criteria.append(criterion)
            else:
                self._limit = min(self._limit, criterion.max_length)
        self._ended = [False] * batch
        self._noise: dict[int, Tensor] = {}
        self._drawn = 0
        keeps = config.return_dict_in_generate
        self.scores: list[list[Tensor]] | None = [[] for _ in range(batch)] if keeps and config.output_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in range(batch)] if keeps and config.output_logits else None
        self.greedy = not self._sampling and not len(processors) and self.scores is None and self.logits is None

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self._stops)

    def left(self, row: int) -> int:
        """Return how many tokens a row may still give."""
        return self._limit - self._lengths[row]

    def _scored(self, row: int, logits: Tensor) -> Tensor:
        """Return ``[1, V]`` processed logits in float32."""
        scores = logits[None].to(copy=True, dtype=torch.float32, device=self._ids.device)
        if self.logits is not None:
            self.logits[row].append(scores.clone())
        for processor in self._processors[row]:
            scores = processor(self._ids[row : row + 1, : self._lengths[row]], scores)
        if self.scores is not None:
            self.scores[row].append(scores)
        return scores

    def law(self, row: int, logits: Tensor) -> Tensor:
        """Return the law ``[V]`` (float32) of the token that follows."""
        scores = self._scored(row, logits)
        if self._sampling:
            return scores.softmax(dim=-1)[0]
        return torch.nn.functional.one_hot(scores[0].argmax(), scores.shape[-1]).float()

    def law_after(self, row: int, drafted: Sequence[int], logits: Tensor) -> Tensor:
        """Return the law ``[V]`` (float32) of a drafter's logits after drafted tokens, by processors without memory."""
        scores = logits[None].to(copy=True, dtype=torch.float32, device=self._ids.device)
        so_far = self._ids[row : row + 1, : self._lengths[row]]
        so_far = torch.cat([so_far, so_far.new_tensor([list(drafted)])], dim=1)
        for processor in self._processors[row]:
            if type(processor) in _WITHOUT_MEMORY:
                scores = processor(so_far, scores)
        scores[:, list(self.excluded)] = -torch.inf
        return scores.softmax(dim=-1)[0]

    def choose(self, row: int, logits: Tensor) -> int:
        """Choose the token that follows a row's answer so far, given ``[V]`` logits."""
        scores = self._scored(row, logits)
        if not self._sampling:
            return int(scores.argmax())
        law = scores.softmax(dim=-1)[0]
        return int((law / self._chance(row, law)).argmax())

    def _chance(self, row: int, law: Tensor) -> Tensor:
        """Return the row's chance at its next token: exponential, so that the least waiting time wins."""
        index = self._lengths[row] - self._prompt
        while self._drawn <= index:
            self._noise[self._drawn] = law.new_empty(len(self._lengths), law.numel()).exponential_(1)
            self._drawn += 1
        slowest = min(
            (length for length, ended in zip(self._lengths, self._ended, strict=True) if not ended), default=0
        )
        for old in [key for key in self._noise if key < slowest - self._prompt]:
            del self._noise[old]
        return self._noise[index][row]

    def emit(self, row: int, token: int) -> bool:
        """Give a token out; return whether the answer has ended."""
        place = self._lengths[row]
        self._ids[row, place] = token
        self._lengths[row] = place + 1
        if self._streamer is not None:
            self._streamer.put(self._ids[row : row + 1, place].cpu())
        over = token in self._stops or place + 1 >= self._limit
        if self._criteria:
            so_far = self._ids[row : row + 1, : place + 1]
            scores = None if self.scores is None else tuple(self.scores[row])
            for criterion in self._criteria:
                over = bool(torch.as_tensor(criterion(so_far, scores)).any()) or over
        self._ended[row] = over
        return over

    def written(self) -> Written:
        """Return all tokens, shorter answers filled up; scores of rows that had ended repeat their last.

        Raises:
            ValueError: if there is nothing to fill them up with.
        """
        longest = max(self._lengths)
        for row, length in enumerate(self._lengths):
            if length < longest:
                if self._padding is None:
                    raise ValueError(
                        "answers of a batch end at different lengths and there is no pad_token_id to fill them up; "
                        "pass pad_token_id to generate()"
                    )
                self._ids[row, length:longest] = self._padding
        return Written(self._ids[:, :longest], _stacked(self.scores), _stacked(self.logits))


def _stacked(kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Return what was kept per token, ``[B, V]`` each."""
    if kept is None:
        return None
    longest = max(len(row) for row in kept)
    return tuple(torch.cat([row[min(i, len(row) - 1)] for row in kept]) for i in range(longest))
