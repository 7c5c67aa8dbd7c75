"""Models of random weights: as many tokens as published, weights drawn once, nothing left unwritten."""

from __future__ import annotations

import pytest
import torch
import transformers

from mmfast.adapters import for_model, random_model, random_model_budgets
from mmfast.adapters.random_models import _SHAPES

NAMES = tuple(random_model_budgets())
PUBLISHED = {
    # What the papers say of one image or video, with one separator for each of 48 rows, and one behind a video.
    "LLaVA-1.5-7B": (576, 7.06e9),
    "LLaVA-NeXT-7B": (2880 + 48, 7.06e9),
    "LLaVA-OneVision-7B": (64 * 196 + 1, 8.03e9),
    "Qwen2.5-VL-7B": (36 * 36, 8.29e9),
}


@pytest.mark.parametrize("name", NAMES)
def test_real_sizes_are_the_published_ones(name: str) -> None:
    found = random_model(name, "real", device="meta")
    visual, weights = PUBLISHED[name]
    assert found.visual == visual
    assert sum(weight.numel() for weight in found.model.parameters()) == pytest.approx(weights, rel=0.01)
    assert {weight.dtype for weight in found.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_written_once_as_transformers_does(name: str) -> None:
    found = random_model(name, "tiny", dtype=torch.float32)
    shape = _SHAPES[name]
    plain = getattr(transformers, shape.model_class)(found.model.config)
    buffers = dict(found.model.named_buffers())
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffers[key], buffer), key
    # Drawn, and of the same spread.
    for (key, mine), other in zip(found.model.named_parameters(), plain.parameters(), strict=True):
        assert bool(mine.isfinite().all()), key
        assert float(mine.detach().std()) == pytest.approx(float(other.detach().std()), rel=0.5, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_read_and_answers_have_one_length(name: str) -> None:
    found = random_model(name, "tiny", dtype=torch.float32)
    inputs = found.inputs(2)
    with torch.inference_mode():
        answer = found.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer.shape == (2, found.visual + 64 + 5)
    assert for_model(found.model) is not None


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name='LLaVA' must be one of"):
        random_model("LLaVA")
    with pytest.raises(ValueError, match="scale='big' must be one of"):
        random_model(NAMES[0], "big")
    with pytest.raises(ValueError, match="scale='big' must be one of"):
        random_model_budgets("big")
