"""ActQKV: the probe, the representatives, and how many blocks are read."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.actqkv import probe_query, representatives, spread
from mmfast.registry import get


def test_tokens_far_from_the_mean_weigh_more() -> None:
    queries = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [4.0, 1.0]]])
    # First channel: mean 1, variance 3; the second is constant. Distances 1, 1, 1 and 9 over the same divisor.
    assert torch.allclose(probe_query(queries), torch.tensor([[4 * 9 / 12, 1.0]]))


def test_equal_tokens_weigh_the_same() -> None:
    assert torch.equal(probe_query(torch.full((2, 3, 2), 5.0)), torch.full((2, 2), 5.0))


def test_representatives_are_the_most_attended_keys_of_each_head() -> None:
    keys = torch.arange(10.0).view(2, 5, 1)
    attended = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.3], [0.9, 0.1, 0.2, 0.8, 0.3]])
    found = representatives(keys, attended, 2, 1)
    assert found[..., 0, 0].tolist() == [[1.0, 2.0, 4.0], [5.0, 8.0, 9.0]]


def test_scores_that_stand_out_leave_less_of_the_budget() -> None:
    flat, peaked = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0]).softmax(dim=0)
    entropy = float(-(weights * weights.log()).sum())
    assert spread(flat) == 1.0
    assert spread(peaked) == pytest.approx(entropy / 1.3862944, abs=1e-6)


def test_the_block_that_the_probe_points_to_is_read() -> None:
    keys = torch.eye(4).repeat_interleave(4, dim=0)[None]
    query = torch.zeros(1, 16, 4)
    query[:, -3:, 2] = torch.tensor([1.0, 2.0, 3.0])
    entries = Entries.of(keys, keys, query)
    options = {"first": 1, "local": 1, "block_size": 4, "window": 3, "dense_layers": 0}
    method = get("actqkv").method(keep=6, by_entropy=False, **options)
    method.prepare(entries)
    stored = torch.cat([keys, keys[:, :1]], dim=1)
    step = Step(stored, stored, torch.tensor([[[0.0, 0.0, 2.0, 0.0]]]), seen=17, memory=entries.memory)
    # Blocks between the ends: 1-4, 5-8, 9-12, 13-14; the third has most of the third direction.
    assert method.choose(step).nonzero().squeeze(-1).tolist() == [0, 9, 10, 11, 12, 15, 16]
    assert entries.memory["queries"].shape == (1, 3, 4)
    assert entries.memory["queries"][0, -1].tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("options", [{"block_size": 0}, {"representatives": 0}, {"window": 0}, {"first": -1}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("actqkv").method(**options)
