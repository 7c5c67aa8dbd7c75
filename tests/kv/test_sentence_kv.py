"""SentenceKV: what a sentence is, what may be read, and what the sentence being written finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.sentence_kv import split_into_sentences
from mmfast.registry import get


def test_frames_rows_and_pieces_of_text_are_sentences() -> None:
    # Three tokens of text, an image of 2 x 2, two frames of three, two images of one, one token of text.
    media = torch.tensor([-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, -1])
    frame = torch.tensor([-1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, -1])
    zeros = torch.zeros(1, 16, 2)
    entries = Entries.of(zeros, zeros, visual=media >= 0, media=media, frame=frame)
    assert split_into_sentences(entries, 2).tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 7, 8]


def prompt() -> tuple[Entries, Tensor]:
    """Eight tokens in four sentences of two; the last one looks at sentences 1 and 2."""
    keys = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0], [-3.0, -3.0], [0, 0]])
    query = torch.zeros(1, 8, 2)
    query[:, -1] = 1.0
    return Entries.of(keys[None], keys[None], query), torch.cat([keys, torch.zeros(4, 2)])[None]


def test_sentences_are_found_by_the_mean_query_of_what_is_being_written() -> None:
    entries, stored = prompt()
    method = get("sentence_kv").method(keep=2, first=0, local=0, sentence=2, length_threshold=0, dense_layers=0)
    method.prepare(entries)

    def read(added: int, query: list[float]) -> list[int]:
        keys = stored[:, : 8 + added]
        chosen = method.choose(
            Step(keys, keys, torch.tensor([[query]]), seen=8 + added, added=added, memory=entries.memory)
        )
        return chosen[0, :8].nonzero().squeeze(-1).tolist()

    assert read(1, [1.0, 0.0]) == [2, 3]
    # The mean with the query before: (1, 0) and (0, 0.5).
    assert read(2, [0.0, 0.5]) == [2, 3]
    # A new sentence begins, and forgets the one before.
    assert read(3, [0.0, 0.5]) == [4, 5]


def test_the_first_tokens_of_a_sentence_read_everything() -> None:
    entries, stored = prompt()
    method = get("sentence_kv").method(keep=2, first=0, local=0, sentence=2, dense_layers=0)
    method.prepare(entries)
    full = []
    for added in range(1, 5):
        keys = stored[:, : 8 + added]
        query = torch.ones(1, 1, 2)
        step = Step(keys, keys, query, seen=8 + added, added=added, memory=entries.memory)
        full.append(method.choose(step) is None)
    assert full == [True, False, True, False]


def test_what_the_end_of_the_prompt_does_not_look_at_is_out_of_reach() -> None:
    entries, stored = prompt()
    options = {"first": 0, "local": 0, "sentence": 2, "length_threshold": 0, "dense_layers": 0, "window": 1}
    method = get("sentence_kv").method(keep=2, semantic_factor=2.5, kernel=1, **options)
    # Five may be read: the window, and the four that its attention is largest for.
    assert method.able(entries, 2)[0].nonzero().squeeze(-1).tolist() == [2, 3, 4, 5, 7]
    method.prepare(entries)
    keys, query = stored[:, :9], -torch.ones(1, 1, 2)
    chosen = method.choose(Step(keys, keys, query, seen=9, memory=entries.memory))
    # Entry 6 would fit best. Sentence 3 is left with entry 7, of key zero.
    assert chosen[0].nonzero().squeeze(-1).tolist() == [2, 7, 8]


@pytest.mark.parametrize("options", [{"semantic_factor": 0.5}, {"sentence": 0}, {"window": 0}, {"kernel": 2}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("sentence_kv").method(**options)
