"""SAISA: what the layers see of visual tokens that never look."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmfast.token_pruning.in_llm.saisa import Saisa, SaisaProjectors, naavit_mask
from support.inside import layer_tokens


def written(folder: Path, vision: int = 6, width: int = 4, depth: int = 3) -> tuple[str, SaisaProjectors]:
    projectors = SaisaProjectors(vision, width, depth)
    path = str(folder / "projectors.safetensors")
    save_file(projectors.state_dict(), path)
    return path, projectors


def test_without_weights_every_layer_sees_the_entering_embeddings() -> None:
    embeds = torch.randn(9, 4)
    tokens = layer_tokens(9, [2, 3, 4], hidden=torch.randn(9, 4), embeds=embeds)
    for layer in Saisa().layers_of(3):
        route = Saisa().route(tokens, layer, 3)
        assert route.selected.numel() == 0
        assert route.selected.dtype == torch.int64
        assert torch.equal(route.states, embeds[2:5])
    assert Saisa().layers_of(3) == [0, 1, 2]
    assert Saisa().vision_signals() == {}
    assert Saisa().keep_counts(576, 40, 3) == [40] * 3
    with pytest.raises(ValueError, match="name 'embeds' in needs"):
        Saisa().route(replace(tokens, embeds=None), 0, 3)


def test_with_weights_each_layer_has_a_projector_of_its_own(tmp_path: Path) -> None:
    path, projectors = written(tmp_path)
    method, patches = Saisa(weights=path), torch.randn(3, 6)
    assert method.vision_signals()["patch_features"].kind == "patch_features"
    tokens = layer_tokens(9, [2, 3, 4], signals={"patch_features": patches})
    seen = [method.route(tokens, layer, 3).states for layer in range(3)]
    for layer, states in enumerate(seen):
        assert torch.allclose(states, projectors(patches, layer))
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    half = layer_tokens(9, [2, 3, 4], hidden=torch.zeros(9, 4).bfloat16(), signals={"patch_features": patches})
    assert method.route(half, 0, 3).states.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    method = Saisa(weights=written(tmp_path)[0])
    with pytest.raises(ValueError, match="needs patch_features of the vision encoder"):
        method.route(layer_tokens(9, [2, 3, 4]), 0, 3)
    tokens = layer_tokens(9, [2, 3, 4], signals={"patch_features": torch.randn(3, 6)})
    with pytest.raises(ValueError, match=r"lacks 'layers.3.0.weight'.*; this model needs exactly .*\(16 tensors\)"):
        method.route(tokens, 0, 4)
    narrow = layer_tokens(9, [2, 3, 4], signals={"patch_features": torch.randn(3, 5)})
    with pytest.raises(ValueError, match=r"'layers.0.0.weight' has shape \(4, 6\), but this model needs \(4, 5\)"):
        method.route(narrow, 0, 3)


def test_gradients_reach_the_projector_of_the_layer_only() -> None:
    projectors = SaisaProjectors(6, 4, 2)
    projectors(torch.randn(5, 6), 1).square().sum().backward()
    for parameter in projectors.layers[1].parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool((parameter.grad != 0).any())
    assert all(parameter.grad is None for parameter in projectors.layers[0].parameters())


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_mask_is_the_causal_one_without_the_rows_of_visual_tokens(kinds: list[bool]) -> None:
    mask = naavit_mask(torch.tensor(kinds))
    text = [place for place, visual in enumerate(kinds) if not visual]
    assert mask.shape == (len(text), len(kinds))
    assert mask.sum(dim=-1).tolist() == [place + 1 for place in text]
    assert all(bool(mask[row, : place + 1].all()) for row, place in enumerate(text))
