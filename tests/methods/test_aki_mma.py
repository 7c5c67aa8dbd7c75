"""AKI: who sees the question, and who does not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.token_pruning.in_llm.aki_mma import AkiMMA, mutual_mask


def test_each_image_sees_the_text_after_it_and_no_later_image() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([4, 5])
    text = torch.tensor([0, 3, 6, 7])
    pairs = AkiMMA().visible([first, second], text)
    assert [(rows.tolist(), columns.tolist()) for rows, columns in pairs] == [([1, 2], [3, 6, 7]), ([4, 5], [6, 7])]
    mask = mutual_mask(torch.ones(8, dtype=torch.bool), pairs)
    assert not bool(mask[1:3, 4:6].any())
    assert mask[1].tolist() == [True, True, False, True, False, False, True, True]


def test_an_image_at_the_end_sees_nothing_more() -> None:
    assert AkiMMA().visible([torch.tensor([2, 3])], torch.tensor([0, 1])) == []
    assert AkiMMA().visible([torch.tensor([2]), torch.tensor([], dtype=torch.int64)], torch.tensor([0])) == []
    assert AkiMMA().visible([], torch.tensor([0, 1])) == []


@given(
    padding=st.integers(0, 4), before=st.integers(0, 4), image=st.integers(1, 6), question=st.integers(0, 6),
    answer=st.integers(0, 4),
)  # fmt: skip
def test_the_mask_against_its_definition(padding: int, before: int, image: int, question: int, answer: int) -> None:
    start = padding + before
    end = start + image + question
    length = end + answer
    text = [place for place in range(padding, end) if not start <= place < start + image]
    real = torch.arange(length) >= padding
    pairs = AkiMMA().visible([torch.arange(start, start + image)], torch.tensor(text, dtype=torch.int64))
    mask = mutual_mask(real, pairs)
    for row in range(length):
        for column in range(length):
            ahead = start <= row < start + image <= column < end
            assert bool(mask[row, column]) == ((column <= row or ahead) and column >= padding)
