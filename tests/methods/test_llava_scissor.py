"""LLaVA-Scissor: components against plain searches, in blocks and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm import llava_scissor
from mmfast.token_pruning.before_llm.llava_scissor import candidate_links, grouped, linked, spanning_links
from mmfast.tokens import Layout, VisualTokens


def scattered(total: int, seed: int, width: int = 3) -> Tensor:
    return torch.randn(total, width, generator=torch.Generator().manual_seed(seed))


def components(features: Tensor, threshold: float) -> tuple[list[int], list[int]]:
    """The same by search: a component per token, and the best connected token of each."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    links = (unit @ unit.T > threshold) | torch.eye(len(unit), dtype=torch.bool)
    found: list[set[int]] = []
    for start in range(len(unit)):
        if any(start in part for part in found):
            continue
        part, queue = {start}, [start]
        while queue:
            near = set(links[queue.pop()].nonzero().flatten().tolist()) - part
            part |= near
            queue += near
        found.append(part)
    heads = [max(sorted(part), key=lambda token: int(links[token].sum())) for part in found]
    order = sorted(range(len(found)), key=lambda index: heads[index])
    owner = [next(number for number, index in enumerate(order) if token in found[index]) for token in range(len(unit))]
    return owner, sorted(heads)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("threshold", [-0.5, 0.6, 0.85, 0.95, 0.999])
def test_components_are_exact_in_blocks_of_any_size(
    threshold: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", rows * 40)
    for seed in range(5):
        features = scattered(40, seed)
        owner, heads = components(features, threshold)
        assert [part.tolist() for part in linked(features, threshold)] == [owner, heads]


def test_a_path_across_all_blocks_is_one_component(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 60)
    angle = torch.linspace(0, 3, 30)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    owner, heads = linked(torch.stack([angle.cos(), angle.sin()], dim=-1), 0.99)
    assert owner.tolist() == [0] * 30
    assert heads.numel() == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_strongest_links_make_the_components_of_a_threshold(seed: int) -> None:
    features = scattered(30, seed)
    pairs, strength = candidate_links(features, [[torch.arange(30)]])
    links = spanning_links(pairs, strength, 30)
    assert links.shape == (2, 29)
    unit = torch.nn.functional.normalize(features, dim=-1)
    own = (unit[links[0]] * unit[links[1]]).sum(dim=-1)
    for threshold in (0.5, 0.8, 0.9):
        count = int((own > threshold).sum())
        group, _ = grouped(30, links[:, :count])
        owner, _ = components(features, threshold)
        assert (group[:, None] == group).equal(torch.tensor(owner)[:, None] == torch.tensor(owner))


def test_equal_similarities_make_no_rings() -> None:
    pairs, strength = candidate_links(torch.ones(9, 2), [[torch.arange(9)]])
    links = spanning_links(pairs, strength, 9)
    assert links.shape == (2, 8)
    assert grouped(9, links)[1].numel() == 1


def test_every_token_joins_the_most_similar_component() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0], [0.1, 1.0], [-1.0, 0.0]])
    keep = get("llava_scissor").method()(VisualTokens(features, Layout.grid(1, 3, frames=2)))
    assert keep.indices.tolist() == [0, 2, 5]
    assert keep.source.tolist() == [0, 0, 1, 0, 1, 2]
    assert keep.sizes.tolist() == [3.0, 2.0, 1.0]
    # The mean over all frames is that of the means of frames; it counts as one more token.
    mean = ((features[0] + features[1]) / 2 + features[3]) / 2
    assert torch.allclose(keep.features[0], (mean + features[0] + features[1] + features[3]) / 4)


@pytest.mark.parametrize("keep", [1, 2, 6, 17, 40, 71])
@pytest.mark.parametrize(("limit", "piece"), [(4096, 256), (4, 256), (4, 3), (4, 1)])
def test_any_count_is_met_with_few_comparisons_too(
    keep: int, limit: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_scissor, "MATRIX_LIMIT", limit)
    monkeypatch.setattr(llava_scissor, "PIECE", piece)
    for seed in range(3):
        tokens = VisualTokens(scattered(72, seed, 5), Layout.grid(3, 6, frames=4))
        found = get("llava_scissor").method(keep=keep, threshold=0.8)(tokens)
        assert len(found) == keep
        assert found.source.unique().tolist() == list(range(keep))


def test_what_stays_over_time_is_joined_first_also_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_scissor, "MATRIX_LIMIT", 4)
    frame = scattered(8, 0, 16)
    tokens = VisualTokens(frame.repeat(3, 1), Layout.grid(2, 4, frames=3))
    found = get("llava_scissor").method(keep=8)(tokens)
    assert (found.source.view(3, 8) == found.source[:8]).all()


def test_frames_of_different_sizes_are_fine() -> None:
    plain = Layout.grid(1, 7)
    frame = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    layout = Layout("video", frame, plain.tile, plain.row, plain.col, plain.is_newline)
    assert len(get("llava_scissor").method(keep=3)(VisualTokens(scattered(7, 0), layout))) == 3


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"threshold=1\.5 must be a cosine similarity"):
        get("llava_scissor").method(threshold=1.5)
