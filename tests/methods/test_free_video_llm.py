"""Free Video-LLM: a few frames in detail where the question points, all of them coarsely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.free_video_llm import averaged, cropped_pairs, distinct, frames_of_paths, paired
from mmfast.tokens import Layout, VisualTokens


def pointed(height: int, width: int, row: int, col: int) -> torch.Tensor:
    """A frame of which one place alone fits the question [1, 0]."""
    frame = torch.tensor([0.0, 1.0]).expand(height, width, 2).clone()
    frame[row, col] = torch.tensor([1.0, 0.0])
    return frame


def test_the_rectangle_lies_around_what_fits() -> None:
    question = torch.tensor([1.0, 0.0])
    features = torch.arange(32.0).view(4, 8, 1)
    # Of 4 x 4 pairs a sixteenth is one; the rectangle is 4 sqrt(1/16) = 1 on each side.
    found = cropped_pairs(features, pointed(4, 8, 2, 5), question, 1 / 16)
    assert found.features.flatten().tolist() == [21.0]
    assert found.places.tolist() == [20]
    assert found.sizes.tolist() == [2.0]
    # A quarter: the place that fits and the first three; on average row 0 and column 1, so the top left corner.
    found = cropped_pairs(features, pointed(4, 8, 2, 5), question, 0.25)
    assert found.places.tolist() == [0, 2, 8, 10]


def test_the_rectangle_stays_inside() -> None:
    found = cropped_pairs(torch.zeros(4, 8, 1), pointed(4, 8, 3, 7), torch.tensor([1.0, 0.0]), 1 / 16)
    assert found.places.tolist() == [30]
    whole = cropped_pairs(torch.zeros(3, 5, 1), torch.zeros(3, 5, 2), torch.zeros(2), 1.0)
    assert whole.places.tolist() == [0, 2, 4, 5, 7, 9, 10, 12, 14]
    assert whole.sizes.tolist() == [2.0, 2.0, 1.0] * 3


def test_the_official_code_reads_the_map_the_other_way_round() -> None:
    features = torch.arange(16.0).view(4, 4, 1)
    seen = pointed(4, 4, 2, 1)
    question = torch.tensor([1.0, 0.0])
    own = cropped_pairs(features, seen, question, 0.5)
    official = cropped_pairs(features, seen, question, 0.5, official=True)
    # 4 x 2 pairs: 3 rows of 1. Read as 2 x 4: 1 row of 3, which is two rows of the image in part.
    assert own.places.numel() == official.places.numel() == 3
    assert own.places.diff().tolist() == [4, 4]
    assert official.places.diff().tolist() == [2, 2]


def test_frames_in_detail_come_once() -> None:
    question = torch.tensor([1.0, 0.0])
    frames = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
    assert frames_of_paths(frames, question, (2, 2, 3)) == ([0, 1, 2], [0, 1, 2])
    assert frames_of_paths(frames, question, (2, 2, 3), official=True) == ([1, 2, 0, 2], [0, 1, 2])


def test_pooling() -> None:
    assert paired(torch.arange(10.0).view(2, 5, 1)).flatten().tolist() == [1, 3, 4, 6, 8, 9]
    coarse = averaged(torch.arange(16.0).view(4, 4, 1), 2, 2)
    assert coarse.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert coarse.places.tolist() == [0, 2, 8, 10]
    assert coarse.sizes.tolist() == [4.0] * 4
    assert averaged(torch.zeros(2, 3, 1), 4, 4).places.tolist() == list(range(6))


def test_places_are_distinct_and_ascend() -> None:
    for wanted in ([0, 0, 0, 5], [5, 5, 5], [2, 3, 3, 5]):
        found = distinct(torch.tensor(wanted), 6)
        assert bool((found.diff() > 0).all())
        assert 0 <= int(found[0]) <= int(found[-1]) < 6


def tokens(frames: int, side: int) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(frames * side**2, 8, generator=generator)
    signals = {"text_embeds": torch.randn(3, 8, generator=generator)}
    return VisualTokens(features, Layout.grid(side, side, frames=frames, modality="video"), signals=signals)


def test_the_papers_count() -> None:
    method = get("free_video_llm").method(slow=1, middle=2, region=0.5, rows=2, columns=2)
    own = method._paths(tokens(6, 8))[0]
    detailed = len(own) - 6
    # 8 x 4 pairs, of which the rectangle takes 6 x 3; coarse frames are 2 x 2.
    assert len(method(tokens(6, 8))) == detailed * 18 + 6 * 4
    official = get("free_video_llm").method(slow=1, middle=2, region=0.5, rows=2, columns=2, compat="official")
    assert len(official(tokens(6, 8))) == 3 * 18 + 6 * 4


def test_every_token_stands_near_where_it_came_from() -> None:
    given = tokens(6, 8)
    kept = get("free_video_llm").method(slow=1, middle=2, region=0.5, rows=2, columns=2)(given)
    means = given.features.view(6, 2, 4, 2, 4, 8).mean(dim=(2, 4)).view(24, 8)
    for place, mean in enumerate(means):
        (found,) = ((kept.features - mean).abs().amax(dim=1) < 1e-5).nonzero().squeeze(-1).tolist()
        assert given.layout.frame[kept.indices[found]] == place // 4


def test_official_order_is_path_by_path() -> None:
    given = tokens(6, 8)
    method = get("free_video_llm").method(slow=1, middle=2, region=0.5, rows=2, columns=2, compat="official")
    parts = torch.cat([part.features for part in method._paths(given)[0]])
    np.testing.assert_array_equal(method(given).features.numpy(), parts.numpy())


@pytest.mark.parametrize("keep", [1, 7, 40, 100, 383])
def test_every_budget_is_met(keep: int) -> None:
    kept = get("free_video_llm").method(keep=keep, slow=1, middle=2, rows=2, columns=2)(tokens(6, 8))
    assert len(kept) == keep
    assert bool(kept.features.isfinite().all())


def test_no_text_does_no_harm() -> None:
    given = tokens(3, 4)
    empty = VisualTokens(given.features, given.layout, signals={"text_embeds": torch.zeros(0, 8)})
    assert bool(get("free_video_llm").method(keep=20)(empty).features.isfinite().all())


@pytest.mark.parametrize(("option", "value"), [("slow", 0), ("region", 0.0), ("rows", True), ("relevance", "change")])
def test_senseless_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        get("free_video_llm").method(**{option: value})
