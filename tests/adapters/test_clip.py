"""CLIP models beside a vision-language model: embeddings, segments, fit, and where they come into a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mmfast
from mmfast.adapters.clip import ClipReader
from mmfast.adapters.media import Segment
from mmfast.plan import Plan
from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens
from support.cases import mixed, one, two
from support.checks import census, first_logits, generate
from support.families import FAMILIES, Batch
from support.reference import decoder_inputs, items_of
from support.tiny_clip import EMBED, LETTERS, WORDS, Letters, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tower(folder: Path) -> mmfast.ClipTower:
    return mmfast.ClipTower.load(folder, tokenizer=Letters())


def text_embed(clip: Any, folder: Path, text: str) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return clip.text_projection(clip.text_model(**tokenizer(text, return_tensors="pt")).pooler_output)


# -------------------------------------------------------------------------------- what it computes


def test_a_short_question_is_one_segment(tower: mmfast.ClipTower, clip: Any, folder: Path) -> None:
    ids = torch.tensor([1, 30, 55, 120, 80])
    text = "".join(LETTERS[token % 26] for token in (30, 55, 80))
    embeds = tower.text_embeds(ids)
    assert embeds.dtype == torch.float32
    assert torch.allclose(embeds, text_embed(clip, folder, text), atol=1e-5)


def test_a_long_question_is_cut_into_segments_that_fit(tower: mmfast.ClipTower, clip: Any, folder: Path) -> None:
    ids = torch.arange(10, 10 + 2 * WORDS + 5)
    embeds = tower.text_embeds(ids)
    assert embeds.shape == (3, EMBED)
    # Letters inside a word, and the last of it, are different tokens: compare the middle, which ends no word.
    tokens = [token % 26 for token in ids.tolist()][WORDS : 2 * WORDS]
    whole = torch.tensor([[54, *tokens, 55]])
    with torch.no_grad():
        expected = clip.text_projection(clip.text_model(input_ids=whole).pooler_output)
    assert torch.allclose(embeds[1], expected[0], atol=1e-5)


def test_no_words_are_one_segment(tower: mmfast.ClipTower) -> None:
    assert tower.text_embeds(torch.tensor([1, 120])).shape == (1, EMBED)


def test_patches_are_projected_as_the_class_token_is(tower: mmfast.ClipTower, clip: Any) -> None:
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vision = clip.vision_model(pixels)
        whole = clip.visual_projection(vision.pooler_output)
    embeds = tower.image_embeds(vision.last_hidden_state[1].to(torch.bfloat16))
    assert embeds.dtype == torch.float32
    assert embeds.shape == (26, EMBED)
    assert torch.allclose(tower.image_embeds(vision.last_hidden_state[1])[0], whole[1], atol=1e-5)


def test_patches_of_another_width_are_refused(tower: mmfast.ClipTower) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 32\] for this CLIP model, got \[3, 16\]"):
        tower.image_embeds(torch.zeros(3, 16))


# ------------------------------------------------------------------------------------- in a plan


@torch.no_grad()
def by_hand(batch: Batch, tower: mmfast.ClipTower, method: Any) -> list[Tensor]:
    """Say what of each image of one row survives, from the model's own calls."""
    model = batch.family.model()
    seen = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
    output = model.model.vision_tower(batch.inputs["pixel_values"], output_hidden_states=True)
    items = items_of(batch)
    ids = torch.tensor(batch.ids[0])
    question = ids[int(items[-1].slots[-1]) + 1 :]
    kept = []
    for item, patches in zip(items, output.hidden_states[-2], strict=True):
        signals = {
            "clip_image_embeds": tower.image_embeds(patches[1:]),
            "clip_text_embeds": tower.text_embeds(question),
            "patch_features": patches[1:],
        }
        if "text_embeds" in method.needs:
            signals["text_embeds"] = torch.zeros(1, seen.shape[1])
        kept.append(method(VisualTokens(seen[item.slots], item.layout, 0, signals)).indices)
    return kept


@pytest.mark.parametrize("name", ["cdpruner", "trim"])
def test_methods_get_its_embeddings(tower: mmfast.ClipTower, name: str) -> None:
    method = get(name).method(keep=7, relevance="clip")
    batch = two(FAMILIES["llava"])
    model = batch.family.model()
    with mmfast.accelerate(model, [method], clip=tower) as fast:
        first_logits(model, batch.inputs)
        records = fast.report().media
    expected = by_hand(batch, tower, method)
    assert [record.entered_indices.tolist() for record in records] == [kept.tolist() for kept in expected]
    with mmfast.accelerate(model, [get(name).method(keep=7)]) as fast:
        first_logits(model, batch.inputs)
        other = fast.report().media
    assert any(not torch.equal(a.entered_indices, b.entered_indices) for a, b in zip(records, other, strict=True))


def test_a_batch_gives_what_its_rows_give(tower: mmfast.ClipTower) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, "cdpruner(keep=6, relevance='clip')", clip=tower) as fast:
        together = generate(model, batch.inputs, 3)
        assert [record.entered for record in fast.report().media] == [6, 6, 6]
        for row in range(len(batch)):
            alone = generate(model, batch.alone(row).inputs, 3)
            assert (alone.logits[0] - together.logits[row]).abs().max() < 1e-4


def test_it_stays_through_a_suspension(tower: mmfast.ClipTower) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    stock = census(model)
    with mmfast.accelerate(model, "cdpruner(keep=6, relevance='clip')", clip=tower) as fast:
        pruned = first_logits(model, batch.inputs)
        with fast.suspended():
            assert census(model) == stock
        assert torch.equal(first_logits(model, batch.inputs), pruned)
    assert census(model) == stock


def test_a_method_inside_another_gets_them_too(tower: mmfast.ClipTower) -> None:
    family = FAMILIES["llava"]
    plan = "anchor_merge(keep=6, pruner='cdpruner', pruner_options=(('relevance', 'clip'),), calibrate=False)"
    with pytest.raises(ValueError, match="needs a CLIP model"):
        mmfast.accelerate(family.model(), plan)
    with mmfast.accelerate(family.model(), plan, clip=tower) as fast:
        first_logits(family.model(), one(family).inputs)
        assert fast.report().media[0].entered == 6


@pytest.mark.parametrize(
    ("ids", "slots", "question"),
    [
        ([5, 120, 120, 6, 7], [1, 2], [6, 7]),  # what follows the image
        ([5, 6, 120, 120], [2, 3], [5, 6]),  # nothing follows it
        ([0, 0, 120, 6, 7], [2], [6, 7]),  # padding is no text
    ],
)
def test_the_question_is_what_follows_the_last_image(ids: list[int], slots: list[int], question: list[int]) -> None:
    class Recorder:
        width = 1

        def text_embeds(self, input_ids: Tensor) -> Tensor:
            return input_ids

        def image_embeds(self, patch_features: Tensor) -> Tensor:
            return patch_features

    rows = torch.tensor([ids])
    reader = ClipReader(Recorder(), rows, rows != 0)
    part = Segment(torch.tensor(slots), Layout.grid(1, len(slots)))
    assert reader.text(0, [part])["clip_text_embeds"].tolist() == question
    assert reader.text(0, []) == {}
    with pytest.raises(ValueError, match="encode the media after"):
        reader.image(part)


def test_embeddings_alone_are_refused(tower: mmfast.ClipTower) -> None:
    with pytest.raises(ValueError, match="pass input_ids"):
        ClipReader(tower, None, torch.ones(1, 3, dtype=torch.bool))


def test_a_plan_without_it_is_refused() -> None:
    model = FAMILIES["llava"].model()
    stock = census(model)
    with pytest.raises(ValueError, match=r"'cdpruner' with relevance='clip' needs a CLIP model: accelerate\(.*clip="):
        mmfast.accelerate(model, "cdpruner(relevance='clip')")
    assert census(model) == stock


def test_a_clip_model_of_another_width_is_refused(tmp_path: Path) -> None:
    narrow = mmfast.ClipTower.load(save(tmp_path, 16), tokenizer=Letters())
    with pytest.raises(ValueError, match="encoder of this model is 32 wide, the CLIP model 16"):
        mmfast.accelerate(FAMILIES["llava"].model(), "cdpruner(relevance='clip')", clip=narrow)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=repr)
def test_every_family_says_how_wide_its_encoder_is(family: Any, tower: mmfast.ClipTower) -> None:
    plan = Plan.parse("cdpruner(keep=2, relevance='clip')")
    with mmfast.accelerate(family.model(), plan, clip=tower) as fast:
        first_logits(family.model(), one(family).inputs)
        assert all(record.entered >= 2 for record in fast.report().media)


# ------------------------------------------------------------------------------------- what is read


def test_it_is_loaded_when_first_used() -> None:
    code = "import mmfast, sys; mmfast.ClipTower; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_other_models_are_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'llama' model, no CLIP model"):
        mmfast.ClipTower.load(tmp_path, tokenizer=Letters())


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors weights, and others are not read"):
        mmfast.ClipTower.load(tmp_path, tokenizer=Letters(), local_files_only=True)


def test_a_tokenizer_must_decode(folder: Path) -> None:
    with pytest.raises(TypeError, match="tokenizer must be the tokenizer or the processor"):
        mmfast.ClipTower.load(folder, tokenizer=object())


def test_weights_go_with_open_clip(folder: Path) -> None:
    with pytest.raises(ValueError, match="goes with source='open_clip:NAME' alone"):
        mmfast.ClipTower.load(folder, tokenizer=Letters(), weights="weights.safetensors")


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'mmfast\[clip\]'"):
        mmfast.ClipTower.load("open_clip:ViT-B-32", tokenizer=Letters(), weights="weights.safetensors")
