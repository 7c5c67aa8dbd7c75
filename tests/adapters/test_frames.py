"""Choosing frames by a question, in conversations, in beams, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import interpolate, normalize

import mmfast
from mmfast.adapters.frames import grown
from mmfast.token_pruning.frame_base import FrameSelector
from mmfast.tokens import Layout
from support.cases import case_id
from support.checks import CLOSE, FAR, census, check_row, first_logits, generate
from support.chosen import frames_of, hidden_by_hand
from support.encoder import encoding_arguments
from support.families import FAMILIES, Batch, Family
from support.prompts import IMAGE, VOCABULARY, Media
from support.tiny_clip import LETTERS, Letters, save

READERS = [family for family in FAMILIES.values() if family.has_video]
every_reader = pytest.mark.parametrize("family", READERS, ids=case_id)
FRAMES = 6
MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
CLIP_MEAN, CLIP_DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PLAIN_TEXT = {"suppress_tokens": list(range(IMAGE, VOCABULARY))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("clip"), 16)
    clip = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in clip.named_parameters():
            # As drawn, every text and every picture mean nearly the same.
            if "bias" in name or "class_embedding" in name or "position_embedding" in name:
                weight.zero_()
            elif "v_proj" in name or "patch_embedding" in name:
                weight.mul_(20)
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(folder: Path) -> mmfast.ClipTower:
    """No tower of any family is as wide: the CLIP model has an encoder of its own."""
    pixels = SimpleNamespace(image_mean=MEAN, image_std=DEVIATION)
    return mmfast.ClipTower.load(folder, tokenizer=SimpleNamespace(tokenizer=Letters(), video_processor=pixels))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(folder).eval()


def asked(family: Family) -> Batch:
    """Two questions about the same video, one after an image too, and one about another video."""
    return family.batch(
        [3, family.video(1, FRAMES), 2, family.image(0, 1), 30],
        [3, family.video(1, FRAMES), (19,) * 25],
        [4],
        [2, family.video(2, FRAMES), 28],
    )


@torch.no_grad()
def scores_by_hand(clip: Any, folder: Path, frames: Tensor, question: list[int]) -> Tensor:
    """Cosines of the frames with the question, cut into what fits the CLIP model."""

    def columns(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    pictures = (frames * columns(DEVIATION) + columns(MEAN)).clamp(0, 1)
    height, width = pictures.shape[-2:]
    small = (20, round(20 * width / height)) if height < width else (round(20 * height / width), 20)
    pictures = interpolate(pictures, small, mode="bicubic", antialias=True)
    top, left = (small[0] - 20) // 2, (small[1] - 20) // 2
    pictures = pictures[:, :, top : top + 20, left : left + 20]
    pixels = (pictures - columns(CLIP_MEAN)) / columns(CLIP_DEVIATION)
    seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "".join(LETTERS[token % 26] for token in question if 2 < token < 110)
    words = tokenizer(text, add_special_tokens=False).input_ids
    rows = []
    for start in range(0, len(words), 12):
        ids = [tokenizer.bos_token_id, *words[start : start + 12], tokenizer.eos_token_id]
        rows.append(clip.text_projection(clip.text_model(input_ids=torch.tensor([ids])).pooler_output)[0])
    return (normalize(seen, dim=-1) @ normalize(torch.stack(rows), dim=-1).T).mean(dim=1)


def best(scores: Tensor, kept: int) -> list[int]:
    return sorted(scores.topk(kept).indices.tolist())


def question_of(batch: Batch, row: int) -> list[int]:
    ids = batch.ids[row]
    last = max(place for place, token in enumerate(ids) if token >= IMAGE)
    return ids[last + 1 :]


PLAN = "aks(keep=2, relevance='clip', depth=0)"
"""Without halving, the two best frames of the whole video."""


@every_reader
def test_the_question_decides(family: Family, tower: mmfast.ClipTower, clip: Any, folder: Path) -> None:
    """In ``generate``, which encodes before it reads, and in a plain forward pass; row by row of a padded batch."""
    model, batch = family.model(), asked(family)
    # transformers puts hooks of its own on a tower when it first runs.
    first_logits(model, batch.inputs)
    stock = census(model)
    wanted = []
    for row in (0, 1, 3):
        (video,) = (media for media in batch.media[row] if media.modality == "video")
        scores = scores_by_hand(clip, folder, frames_of(family, video), question_of(batch, row))
        wanted.append(best(scores, 2))
    assert wanted[0] != wanted[1]
    with mmfast.accelerate(model, PLAN, clip=tower) as fast:
        for call in (first_logits, lambda *both: generate(*both, 2)):
            call(model, batch.inputs)
            found = [record.encoded_frames for record in fast.report().media if record.modality == "video"]
            assert [own.tolist() for own in found] == wanted
        model.generate(**batch.inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        beams = [record.encoded_frames for record in fast.report().media if record.modality == "video"]
        assert [own.tolist() for own in beams[::2]] == [own.tolist() for own in beams[1::2]] == wanted
    assert census(model) == stock


@every_reader
def test_the_rest_follows_the_reference(family: Family, tower: mmfast.ClipTower) -> None:
    batch = asked(family)
    with mmfast.accelerate(family.model(), PLAN, clip=tower) as fast:
        done, report = generate(family.model(), batch.inputs, 2), fast.report()
    for row in range(len(batch)):
        alone = batch.alone(row)

        def signals(frames: Tensor, row: int = row) -> dict[str, Tensor]:
            text = tower.text_embeds(torch.tensor(question_of(batch, row)))
            return {"clip_frame_embeds": tower.frame_embeds(frames), "clip_text_embeds": text}

        check_row(alone, hidden_by_hand(alone, PLAN, signals)[0], row, done, report)


def test_frames_chosen_by_a_question_need_a_clip_model_that_knows_pixels(folder: Path) -> None:
    model = FAMILIES["llava_onevision"].model()
    stock = census(model)
    with pytest.raises(ValueError, match="method 'aks' with relevance='clip' needs a CLIP model"):
        mmfast.accelerate(model, PLAN)
    tower = mmfast.ClipTower.load(folder, tokenizer=Letters())
    with pytest.raises(ValueError, match="pass the processor of this model as tokenizer="):
        mmfast.accelerate(model, PLAN, clip=tower)
    with pytest.raises(ValueError, match="pass the processor"):
        tower.frame_embeds(torch.zeros(1, 3, 8, 8))
    assert census(model) == stock


@every_reader
@pytest.mark.parametrize("length", [1, None], ids=["decode", "prefill"])
def test_a_call_that_was_broken_off_asks_nothing_any_more(
    family: Family, tower: mmfast.ClipTower, length: int | None
) -> None:
    """After Ctrl-C in a decode step or in a prefill, ``generate`` chooses by the question it is given."""
    model = family.model()
    first, second = (asked(family).alone(row) for row in (0, 1))

    def chosen(fast: mmfast.Accelerated, batch: Batch) -> list[int]:
        generate(model, batch.inputs, 3, **PLAIN_TEXT)
        (found,) = (record.encoded_frames for record in fast.report().media if record.modality == "video")
        return found.tolist()

    def interrupt(layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if length is None or hidden.shape[1] == length:
            raise KeyboardInterrupt

    with mmfast.accelerate(model, PLAN, clip=tower) as fast:
        expected = [chosen(fast, batch) for batch in (first, second)]
        assert expected[0] != expected[1]
        handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupt, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            chosen(fast, first)
        handle.remove()
        assert [chosen(fast, batch) for batch in (second, first)] == expected[::-1]


def test_the_question_has_to_be_there(tower: mmfast.ClipTower) -> None:
    family = FAMILIES["qwen2_vl"]
    model, batch = family.model(), family.batch([3, family.video(1, FRAMES), 9])
    arguments = encoding_arguments(model, "video", batch.inputs)
    with mmfast.accelerate(model, PLAN, clip=tower):
        with pytest.raises(ValueError, match="has to read the question before the video is encoded"):
            model.base_model.get_video_features(**arguments, return_dict=True)
        broken = {**batch.inputs, "input_ids": batch.inputs["input_ids"][:, :-12]}
        broken = {**broken, **{name: broken[name][:, :-12] for name in ("attention_mask", "mm_token_type_ids")}}
        with pytest.raises(ValueError, match="do not say which video belongs to which prompt"):
            first_logits(model, broken)


@every_reader
def test_a_new_question_chooses_anew_where_that_was_asked_for(family: Family, tower: mmfast.ClipTower) -> None:
    """Frames are encoded again; otherwise those of the first question stay."""
    model = family.model()
    first = family.batch([3, family.video(1, FRAMES), 25])
    chosen: dict[str, list[list[int]]] = {}
    for policy in ("reuse", "reselect"):
        with mmfast.accelerate(model, PLAN, clip=tower, on_new_turn=policy) as fast:
            answer = generate(model, first.inputs, 2, **PLAIN_TEXT)
            chosen[policy] = [fast.report().media[0].encoded_frames.tolist()]
            more = torch.arange(40, 70)[None]
            ids = torch.cat([first.inputs["input_ids"], answer.tokens, more], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            cache = {"past_key_values": answer.output.past_key_values}
            generate(model, {**inputs, **cache}, 2, **PLAIN_TEXT)
            chosen[policy].append(fast.report().media[0].encoded_frames.tolist())
    assert chosen["reuse"][0] == chosen["reuse"][1] == chosen["reselect"][0]
    brought = {name: value for name, value in first.inputs.items() if name not in inputs}
    for name, value in brought.items():
        if name.endswith("token_type_ids"):
            brought[name] = torch.nn.functional.pad(value, (0, ids.shape[1] - value.shape[1]))
    with mmfast.accelerate(model, PLAN, clip=tower) as fast:
        first_logits(model, {**brought, **inputs})
        assert chosen["reselect"][1] == fast.report().media[0].encoded_frames.tolist()


@every_reader
def test_features_made_ahead_keep_what_was_chosen(family: Family) -> None:
    model, batch = family.model(), family.batch([3, family.video(1, FRAMES), 9])
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes no features made ahead")
    arguments = encoding_arguments(model, "video", batch.inputs)
    rest = {name: value for name, value in batch.inputs.items() if not name.startswith("pixel")}
    before = model.base_model.get_video_features(**arguments, return_dict=True)
    with mmfast.accelerate(model, "uniform_frames(keep=2)") as fast:
        logits = first_logits(model, batch.inputs)
        features = model.base_model.get_video_features(**arguments, return_dict=True)
        assert (first_logits(model, {**rest, "mm_encoder_outputs": {"video": features}}) - logits).abs().max() < CLOSE
        assert fast.report().media[0].encoded_frames.tolist() == [1, 4]
        with pytest.raises(ValueError, match="video features were not made while this plan was active"):
            first_logits(model, {**rest, "mm_encoder_outputs": {"video": before}})


def test_gradients_reach_the_tower_through_chosen_frames() -> None:
    family = FAMILIES["qwen3_vl"]
    model, batch = family.model(), family.batch([3, family.video(1, FRAMES), 9])
    weight = model.model.visual.patch_embed.proj.weight
    with mmfast.accelerate(model, "uniform_frames(keep=2)"), torch.enable_grad():
        loss = model(**batch.inputs).logits[:, -1].square().sum()
        (slope,) = torch.autograd.grad(loss, weight)
    assert float(slope.abs().max()) > 0


def test_a_choice_that_breaks_its_promise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llava_onevision"]
    model, batch = family.model(), family.batch([3, family.video(1, FRAMES), 9])
    method: type[FrameSelector] = mmfast.Plan.parse("uniform_frames(keep=2)").methods[0].__class__  # type: ignore[assignment]
    for wrong in ([3, 1], [1], [1, 1], [4, 6], [-1, 2]):
        monkeypatch.setattr(method, "choose", lambda *_, wrong=wrong: torch.tensor(wrong))
        with (
            mmfast.accelerate(model, "uniform_frames(keep=2)"),
            pytest.raises(ValueError, match="method 'uniform_frames' must choose 2 distinct frames of 6, ascending"),
        ):
            first_logits(model, batch.inputs)


def test_signals_of_the_tower_are_those_of_the_chosen_frames() -> None:
    """Also where a method inside the language model reads them, and where class tokens come per frame."""
    for name in ("video_llava", "qwen2_5_vl"):
        family = FAMILIES[name]
        model, batch = family.model(), family.batch([3, family.video(1, FRAMES), 24])
        plain = first_logits(model, batch.inputs)
        plan = "uniform_frames(keep=3) + vispruner(keep=5)"
        with mmfast.accelerate(model, plan) as fast:
            done, report = generate(model, batch.inputs, 2), fast.report()
        check_row(batch, hidden_by_hand(batch, plan)[0], 0, done, report)
        assert (done.logits[:, 0] - plain).abs().max() > FAR


def test_layouts_that_hide_the_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be told apart by frame"):
        grown(Layout.unknown(10, "video"), 2, 4)
    full = grown(Layout.grid(2, 2, frames=2, modality="video"), 2, 3)
    assert full.frame.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert full.row.tolist() == [0, 0, 1, 1] * 3


def test_other_methods_see_frames_numbered_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Layout] = []
    uniform: Any = mmfast.Plan.parse("uniform(keep=4)").methods[0].__class__
    monkeypatch.setattr(uniform, "select", lambda self, tokens, kept: seen.append(tokens.layout) or torch.arange(kept))
    family = FAMILIES["llava_onevision"]
    batch = family.batch([3, family.video(1, FRAMES), 9])
    (video,) = (piece for piece in batch.rows[0] if isinstance(piece, Media))
    with mmfast.accelerate(family.model(), "uniform_frames(keep=2) + uniform(keep=4)") as fast:
        first_logits(family.model(), batch.inputs)
        (record,) = fast.report().media
    assert seen[0].frame.unique().tolist() == [0, 1]
    assert record.tokens == len(video.layouts[0])
    assert record.layout.frame[record.entered_indices].unique().tolist() == [-1, 1]
