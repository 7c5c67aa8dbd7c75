"""PruneVid before the language model: scenes, what stands still, and counts."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.prunevid import contiguous, mean_similarity
from mmfast.tokens import Layout, VisualTokens


@pytest.mark.parametrize(
    ("labels", "windows"),
    [
        ([0], [(0, 0)]),
        ([0, 1, 2], [(0, 2)]),  # no cluster has a run of two: all is one scene
        ([0, 0, 1, 2, 2, 2], [(0, 1), (2, 5)]),  # the orphan joins the longer run
        ([0, 0, 1, 2, 2], [(0, 2), (3, 4)]),  # of two equal ones the earlier
        ([0, 0, 1, 0, 0], [(0, 4)]),  # both longest runs stay, and what lies between closes the gap
        ([1, 0, 0, 2, 1, 1, 1, 0, 0], [(0, 3), (4, 6), (7, 8)]),  # what has joined makes a run longer for the next
        ([0, 0, 0, 1, 0, 0, 2, 2], [(0, 5), (6, 7)]),  # orphans in a row go together
    ],
)
def test_clusters_are_made_contiguous(labels: list[int], windows: list[tuple[int, int]]) -> None:
    assert contiguous(labels) == windows


def test_mean_similarity_is_that_of_all_pairs() -> None:
    video = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(video, dim=-1)
    pairs = torch.einsum("spd,tpd->pst", unit, unit)
    wanted = (pairs.sum(dim=(1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(dim=1)) / 12
    assert torch.allclose(mean_similarity(video.flatten(0, 1), list(torch.arange(12).view(4, 3))), wanted, atol=1e-6)
    assert mean_similarity(video[0], [torch.arange(3)]).tolist() == [-torch.inf] * 3


def test_a_still_place_is_averaged_at_its_place_in_the_first_frame() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, -1.0]])
    keep = get("prunevid").method()(VisualTokens(features, Layout.grid(1, 2, frames=2)))
    assert keep.indices.tolist() == [0, 1, 3]
    assert keep.features.tolist() == [[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert keep.source.tolist() == [0, 1, 0, 2]
    assert keep.sizes.tolist() == [2.0, 1.0, 1.0]


def test_only_as_many_places_are_averaged_as_the_budget_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, 8, generator=generator)
    change = torch.tensor([0.1, 0.02, 0.3, 0.01, 0.2, 0.15])[:, None] * torch.randn(6, 8, generator=generator)
    tokens = VisualTokens(torch.cat([first, first + change]), Layout.grid(2, 3, frames=2))
    similarity = mean_similarity(tokens.features, list(torch.arange(12).view(2, 6)))
    keep = get("prunevid").method(keep=10)(tokens)
    assert keep.indices[keep.sizes == 2].tolist() == similarity.topk(2).indices.sort().values.tolist()
    assert len(get("prunevid").method(keep=4)(tokens)) == 4


def test_small_sets_are_left_as_they_are_where_the_data_decide() -> None:
    generator = torch.Generator().manual_seed(0)
    method = get("prunevid").method()
    assert method(VisualTokens(torch.randn(14, 8, generator=generator), Layout.grid(2, 7))) is None
    assert len(method(VisualTokens(torch.randn(16, 8, generator=generator), Layout.grid(4, 4)))) == 8


def test_frames_of_different_sizes_are_not_averaged() -> None:
    plain = Layout.grid(1, 6)
    frame = torch.tensor([0, 0, 1, 1, 1, 1])
    layout = Layout("video", frame, plain.tile, plain.row, plain.col, plain.is_newline)
    tokens = VisualTokens(torch.eye(6), layout)
    assert get("prunevid").method(threshold=-1.0)(tokens) is None
    assert len(get("prunevid").method(keep=4)(tokens)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenes": 0.0}, r"scenes=0.0 must lie in \(0, 1\]"),
        ({"cluster_ratio": 1.5}, r"cluster_ratio=1.5 must lie in \(0, 1\]"),
        ({"threshold": 2}, "threshold=2 must be a cosine similarity"),
        ({"frame_neighbours": 0}, "frame_neighbours=0 must be at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("prunevid").method(**options)
