"""AIM's merging: plain averages, frame by frame."""

from __future__ import annotations

import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.aim_merge import average_pairs
from mmfast.tokens import Layout, VisualTokens


def test_a_token_that_stands_for_several_counts_as_one() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [9.0, 0.1]])
    merged, slots, source = average_pairs(features, [1, 1, 1])
    # 0 joins 1: (1 + 3) / 2 = 2; 2 joins that: (2 + 5) / 2 = 3.5; and 3 joins at last: (3.5 + 9) / 2.
    assert torch.allclose(merged, torch.tensor([[6.25, 0.05]]))
    assert slots.tolist() == [1]
    assert source.tolist() == [0, 0, 0, 0]


def test_joining_several_takes_one_plain_mean() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    merged, slots, source = average_pairs(features, [2])
    assert slots.tolist() == [1, 3]
    assert source.tolist() == [0, 0, 0, 1]
    assert merged.tolist() == [[3.0, 0.0], [0.0, 1.0]]


def test_frames_are_merged_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 8, 4, generator=generator)
    decision = get("aim_merge").method()(VisualTokens(frames.flatten(0, 1), Layout.grid(2, 4, frames=3)))
    assert len(decision) == 6
    for index, frame in enumerate(frames):
        alone = get("aim_merge").method()(VisualTokens(frame, Layout.grid(2, 4)))
        assert decision.indices[2 * index : 2 * index + 2].tolist() == (alone.indices + 8 * index).tolist()
        assert torch.equal(decision.features[2 * index : 2 * index + 2], alone.features)
