"""VidCom2: counts that add up, and what is kept, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.vidcom2 import frame_scales, steady_channels
from mmfast.tokens import Layout, VisualTokens

# In the first two channels, which vary least, all tokens agree but one in each of two frames, and
# those of the third frame.
COMMON, OWN, OTHER = [1.0, 0.0], [0.9, -0.4], [0.1, 0.9]
STEADY = torch.tensor([[COMMON, COMMON, OWN, COMMON], [COMMON, OWN, COMMON, COMMON], [OTHER, OTHER, OTHER, OTHER]])
NOISE = 50 * torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
VIDEO = VisualTokens(torch.cat([STEADY, NOISE], dim=-1).flatten(0, 1), Layout.grid(2, 2, frames=3, modality="video"))


def counts(tokens: VisualTokens, **options: object) -> list[int]:
    kept = get("vidcom2").method(**options)(tokens).indices
    return torch.bincount(tokens.layout.frame[kept], minlength=int(tokens.layout.frame.max()) + 1).tolist()


def test_the_steady_half_decides() -> None:
    assert steady_channels(VIDEO.features).tolist() == [0, 1]
    assert steady_channels(torch.randn(4, 1)).tolist() == [0]


def test_uncommon_frames_keep_more_and_uncommon_tokens_stay() -> None:
    decision = get("vidcom2").method(keep=6)(VIDEO)
    assert counts(VIDEO, keep=6) == [1, 1, 4]
    assert decision.indices[:2].tolist() == [2, 5]


def test_counts_add_up_where_those_of_the_official_code_do_not() -> None:
    assert counts(VIDEO, keep=0.4, compat="official") == [1, 1, 3]
    assert counts(VIDEO, keep=0.9, compat="official") == [2, 2, 4]
    assert [sum(counts(VIDEO, keep=keep)) for keep in range(1, 12)] == list(range(1, 12))
    # A frame cannot keep more than it has: the others take what is left.
    assert counts(VIDEO, keep=10) == [3, 3, 4]


def test_the_official_code_keeps_a_token_of_each_frame() -> None:
    assert counts(VIDEO, keep=1, compat="official") == [1, 1, 1]
    assert sum(counts(VIDEO, keep=1)) == 1


def test_an_image_is_one_frame() -> None:
    image = VisualTokens(VIDEO.features, Layout.grid(3, 4))
    assert counts(image, keep=0.5) == counts(image, keep=0.5, compat="official") == [6]
    assert frame_scales([torch.ones(4)], 0.3).tolist() == pytest.approx([0.3])


def test_frames_of_different_sizes() -> None:
    layout = replace(VIDEO.layout, frame=torch.tensor([0] * 2 + [1] * 9 + [2]))
    assert sum(counts(VisualTokens(VIDEO.features, layout), keep=5)) == 5


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get("vidcom2").method(compat="paper")
