"""StreamMem: slots of summaries, budgets without room, and what stays as it was."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.streammem import choose_slots
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView

STREAMMEM = get("streammem").method


def video(frames: int, size: int, text: int = 3, heads: int = 2) -> Entries:
    """Make a system token, a video and some text."""
    drawn = torch.Generator().manual_seed(frames * size)
    frame = torch.cat([torch.tensor([-1]), torch.arange(frames).repeat_interleave(size), torch.full((text,), -1)])
    keys, values = torch.randn(2, heads, len(frame), 4, generator=drawn)
    query = torch.randn(2 * heads, len(frame), 4, generator=drawn)
    visual = frame >= 0
    return Entries(keys, values, visual, visual.long() - 1, frame, attention=AttentionView(query, keys))


@pytest.mark.parametrize(("frames", "size"), [(1, 12), (4, 3), (12, 1), (3, 7)])
def test_budget_is_exact_and_text_stays(frames: int, size: int) -> None:
    prompt = video(frames, size)
    for kept in range(1, frames * size):
        found = STREAMMEM(keep=kept)(prompt)
        assert int(found.kept[prompt.visual].sum()) == kept
        assert bool(found.kept[~prompt.visual].all())
        changed = (found.keys != prompt.keys).any(dim=-1).any(dim=0)
        assert not bool((changed & ~found.kept).any())
        assert not bool((changed & ~prompt.visual).any())


def test_summary_is_weighted_by_the_attention_of_the_own_head() -> None:
    prompt = video(2, 3, heads=1)
    method = STREAMMEM(keep=3, proxies=2)
    found = method(prompt)
    weights = torch.stack([prompt.view.logits(torch.tensor([row]), masked=False)[:, 0] for row in (8, 9)])
    weights = weights[..., 1:7].softmax(dim=-1).mean(dim=(0, 1))
    assert torch.allclose(method.score(prompt, 3)[1:7], weights, atol=1e-6)
    best = int(weights.argmax())
    for frame in range(2):
        own = list(range(3 * frame, 3 * frame + 3))
        slot = max(place for place in own if place != best)
        share = weights[own] / weights[own].sum()
        assert bool(found.kept[1 + slot])
        expected = share @ prompt.values[0, 1 + 3 * frame : 4 + 3 * frame]
        assert torch.allclose(found.values[0, 1 + slot], expected, atol=1e-6)
    assert torch.equal(found.values[0, 1 + best], prompt.values[0, 1 + best])


def test_a_whole_frame_gives_its_place_away() -> None:
    score = torch.tensor([9.0, 8.0, 1.0, 2.0, 3.0])
    frame = torch.tensor([0, 0, 1, 1, 1])
    stays, slots = choose_slots(score, frame, 4)
    assert stays.tolist() == [True, True, False, True, True]
    assert slots.tolist() == [False, False, False, False, True]


def test_with_less_room_than_frames_the_most_attended_are_summarised() -> None:
    score = torch.tensor([1.0, 1.0, 5.0, 0.0, 2.0, 2.0])
    stays, slots = choose_slots(score, torch.tensor([0, 0, 1, 1, 2, 2]), 2)
    assert stays.tolist() == slots.tolist() == [False, False, False, True, False, True]


def test_entries_of_no_frame_have_no_summary() -> None:
    score = torch.tensor([3.0, 0.5, 2.0, 1.0])
    stays, slots = choose_slots(score, torch.tensor([-1, -1, 0, 0]), 2)
    assert stays.tolist() == [True, False, False, True]
    assert slots.tolist() == [False, False, False, True]


def test_text_alone_is_left_alone() -> None:
    assert STREAMMEM(keep=1)(video(0, 1, text=9)) is None


@pytest.mark.parametrize(("field", "value"), [("proxies", 0), ("proxies", True), ("entries", "all")])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        STREAMMEM(**{field: value})
