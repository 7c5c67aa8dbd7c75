"""Squeezed Attention: the clustering, and prompts read through it."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import means_by_label
from mmfast.kv.retrieval.squeezed_attention import cluster, cluster_scores
from mmfast.registry import get


def test_clusters_are_directions_and_their_centres_are_means_of_the_keys_themselves() -> None:
    generator = torch.Generator().manual_seed(1)
    angle = torch.tensor([0.0, 2.0, 4.0]).repeat_interleave(20) + 0.1 * torch.randn(60, generator=generator)
    lengths = 1 + 9 * torch.rand(60, 1, generator=generator)
    keys = (torch.stack([angle.cos(), angle.sin()], dim=-1) * lengths)[None]
    # Some starts end with two clusters in one direction; these do not.
    labels = cluster(keys, 3, iterations=20, seed=2)
    assert [len(set(part.tolist())) for part in labels[0].split(20)] == [1, 1, 1]
    assert labels[0].unique().numel() == 3
    centres, sizes = means_by_label(keys, labels, 3)
    assert sizes.tolist() == [[20.0, 20.0, 20.0]]
    assert torch.allclose(centres[0, labels[0, 0]], keys[0, :20].mean(dim=0), atol=1e-5)


def test_no_key_is_closer_to_the_centre_of_another_cluster_when_nothing_moves_any_more() -> None:
    keys = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    labels = cluster(keys, 6, iterations=100, seed=0)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    centres, _ = means_by_label(unit, labels, 6)
    distance = torch.cdist(unit, centres)
    assert torch.equal(distance.argmin(dim=-1), labels)
    assert torch.equal(cluster(keys, 6, iterations=100, seed=0), labels)
    assert not torch.equal(cluster(keys, 6, iterations=100, seed=1), labels)


def test_large_logits_do_not_overflow() -> None:
    scores = cluster_scores(torch.tensor([[[1000.0, 999.0]]]), torch.tensor([[2.0, 1.0]]))
    expected = torch.tensor([[[1.0, torch.tensor(-1.0).exp()]]]) / (2 + torch.tensor(-1.0).exp())
    assert torch.allclose(scores, expected)


def prompt() -> Entries:
    """Two directions of six keys each, and two last tokens that ask for the first."""
    first, second = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    keys = torch.cat([first.repeat(6, 1), second.repeat(6, 1), torch.zeros(2, 2)])[None]
    query = torch.zeros(1, 14, 2)
    query[:, -2:, 0] = 2.0
    return Entries.of(keys, keys, query)


def test_clusters_above_what_the_end_of_the_prompt_gives_are_read() -> None:
    entries = prompt()
    method = get("squeezed_attention").method(keep=7, observation=2, clusters=0.2, dense_layers=0)
    method.prepare(entries)
    keys = torch.cat([entries.keys, torch.zeros(1, 1, 2)], dim=1)

    def read(query: list[float]) -> list[int]:
        step = Step(keys, keys, torch.tensor([[query]]), seen=15, memory=entries.memory)
        return method.choose(step)[0].nonzero().squeeze(-1).tolist()

    assert read([2.0, 0.0]) == [0, 1, 2, 3, 4, 5, 12, 13, 14]
    assert read([0.0, 2.0]) == [6, 7, 8, 9, 10, 11, 12, 13, 14]
    # Nothing stands out, and nothing reaches the threshold.
    assert read([0.0, 0.0]) == [12, 13, 14]


@pytest.mark.parametrize("options", [{"clusters": 0.0}, {"observation": 0}, {"iterations": 0}, {"seed": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("squeezed_attention").method(**options)
