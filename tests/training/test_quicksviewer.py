"""Quicksviewer's cubes: where a video is cut, and what becomes of the pieces."""

from __future__ import annotations

import pytest
import torch

from mmfast.training.modules.quicksviewer import (
    CubeCutter,
    QuicksviewerCubes,
    cubes_of,
    cut_count,
    momentum_changes,
)


def test_changes_are_smoothed_over_time() -> None:
    values = torch.tensor([0.0, 2.0, 2.0, 5.0])[:, None, None]
    torch.testing.assert_close(momentum_changes(values).flatten(), torch.tensor([2.0, 0.4, 2.48]))


def test_halves_of_cuts_are_rounded_to_even() -> None:
    # 12.5 / 5 = 2.5 rounds to 2, 17.5 / 5 = 3.5 to 4.
    assert [cut_count(frames, per) for frames, per in ((25, 10), (35, 10), (3, 5), (2, 1))] == [1, 3, 1, 1]


def test_the_cubes_cover_the_video_once() -> None:
    gates = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    assert [list(range(6))[cube] for cube in cubes_of(gates)] == [[0], [1, 2, 3], [4], [5]]


def test_a_video_is_cut_where_it_changes() -> None:
    torch.manual_seed(0)
    cutter = CubeCutter(2)
    with torch.no_grad():
        # The logit of a cut is the first channel of the norm, that is, the sign of the change.
        cutter.change.weight.copy_(torch.eye(2))
        cutter.change.bias.zero_()
        cutter.mlp = torch.nn.Linear(2, 2, bias=False)
        cutter.mlp.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    video = torch.zeros(15, 4, 2)
    video[6:, :, 0] += 1
    video[11:, :, 0] += 1
    gates = cutter(video)
    assert (gates.round().nonzero().flatten() + 1).tolist() == [6, 11]


def test_noise_is_for_training_alone() -> None:
    torch.manual_seed(0)
    cutter, video = CubeCutter(8), torch.randn(60, 4, 8)
    assert torch.equal(cutter(video), cutter(video))
    drawn = [cutter(video, 100.0, torch.Generator().manual_seed(seed)).round() for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert {int(own.sum()) for own in drawn} == {11}


def test_the_cutter_learns_through_the_thumbnail() -> None:
    torch.manual_seed(0)
    module = QuicksviewerCubes(8, 16, queries=4, heads=2)
    found = module(torch.randn(10, 36, 8), (6, 6))
    assert found.shape == (4 + 2 * 4, 16)
    found[4:].sum().backward(retain_graph=True)
    assert module.cutter.change.weight.grad is None or not module.cutter.change.weight.grad.any()
    found[:4].square().sum().backward()
    assert module.cutter.change.weight.grad.any()


def test_a_cube_knows_the_order_of_its_frames() -> None:
    torch.manual_seed(0)
    module = QuicksviewerCubes(8, 16, queries=4, heads=2)
    with torch.no_grad():
        module.attn.in_proj_weight.mul_(20)
        module.cutter.mlp[2].weight.zero_()
    # Nothing is likelier than anything: the one cut is the first there is, before frame 1.
    video = torch.randn(4, 9, 8)
    found, turned = module(video, (3, 3)), module(video[[0, 1, 3, 2]], (3, 3))
    assert found.shape == (1 + 2 * 4, 16)
    torch.testing.assert_close(turned[:5], found[:5])
    assert not torch.allclose(turned[5:], found[5:], atol=1e-4)


def test_one_frame_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="a video of 1 frame cannot be cut; give at least 2"):
        CubeCutter(8)(torch.randn(1, 4, 8))
