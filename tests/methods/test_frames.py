"""The contract of methods that choose frames: what holds for every one of them on every family that reads videos.

The reference encodes the whole video with the untouched model and takes the tokens of other frames out by hand.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import mmfast
from mmfast.adapters import for_model
from support.cases import case_id, mixed, text_only
from support.checks import CLOSE, FAR, Generated, census, check_row, first_logits, generate, registries
from support.chosen import hidden_by_hand
from support.families import FAMILIES, Batch, Family, cast
from support.reference import decoder_inputs, items_of

METHODS = mmfast.methods("frames")
READERS = [family for family in FAMILIES.values() if family.has_video]
PAIRS = list(product(READERS, METHODS))
FRAMES, STEPS, LONG = 6, 2, 24

every = pytest.mark.parametrize(("family", "info"), PAIRS, ids=case_id)
every_reader = pytest.mark.parametrize("family", READERS, ids=case_id)
BESIDE = ["divprune(keep=0.4)", "hiprune(keep=5)", "fastv(keep=0.4)", "divprune(keep=0.5) + pyramiddrop(keep=0.5)"]
"""What runs beside a method that chooses frames and is compared with the reference."""


def clips(family: Family) -> Batch:
    """Rows with a video and an image, with text alone, with an image, and with two videos."""
    # Only families that pack can read videos of different lengths at once.
    other = 4 if for_model(family.model()).packs_patches else FRAMES
    # The text behind a video outlasts its time positions: in some models generate() counts on from the last
    # position and a plain forward pass from the largest.
    return family.batch(
        [3, family.video(1, FRAMES), 2, family.image(0, 1), LONG],
        [6],
        [2, family.image(0, 5), 3],
        [2, family.video(3, other), 1, family.video(4, FRAMES), LONG],
    )


@cache
def untouched(family: Family, rows: str) -> Generated:
    """Generate without a plan."""
    return generate(family.model(), {"clips": clips, "text": text_only, "images": mixed}[rows](family).inputs, STEPS)


@cache
def selected(family: Family, plan: str) -> tuple[Generated, mmfast.Report]:
    """Generate for the videos under a plan, once for all tests."""
    with mmfast.accelerate(family.model(), plan) as fast:
        return generate(family.model(), clips(family).inputs, STEPS), fast.report()


def check(family: Family, plan: str) -> None:
    """Compare every logit and every token kept with the reference, and that a difference was made where it should."""
    batch, (done, report) = clips(family), selected(family, plan)
    for row in range(len(batch)):
        alone = batch.alone(row)
        stand_in, chosen = hidden_by_hand(alone, plan)
        check_row(alone, stand_in, row, done, report)
        videos = [record for record in report.media if record.row == row and record.modality == "video"]
        assert [own.encoded_frames.tolist() for own in videos if own.encoded_frames is not None] == chosen
        if videos:
            assert (done.logits[row, 0] - untouched(family, "clips").logits[row, 0]).abs().max() > FAR


@every
def test_keep_all_is_identity(family: Family, info: mmfast.MethodInfo) -> None:
    with mmfast.accelerate(family.model(), f"{info.name}(keep=1.0)") as fast:
        during = generate(family.model(), clips(family).inputs, STEPS)
        assert all(record.encoded_frames is None for record in fast.report().media)
    assert torch.equal(during.logits, untouched(family, "clips").logits)


@every
def test_prompts_without_videos_are_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    with mmfast.accelerate(family.model(), f"{info.name}(keep=1)"):
        for name, rows in (("text", text_only), ("images", mixed)):
            during = generate(family.model(), rows(family).inputs, STEPS)
            assert torch.equal(during.logits, untouched(family, name).logits)


@every
def test_prefill_and_decode_equal_the_reference(family: Family, info: mmfast.MethodInfo) -> None:
    check(family, f"{info.name}(keep=2)")


@every_reader
@pytest.mark.parametrize("beside", BESIDE)
def test_other_stages_go_on_from_the_chosen_frames(family: Family, beside: str) -> None:
    check(family, f"uniform_frames(keep=3) + {beside}")


@every_reader
def test_methods_of_the_cache_go_on_from_the_chosen_frames(family: Family) -> None:
    """As from a prompt out of which a method before the language model took the same tokens."""
    batch = family.batch([3, family.video(1, FRAMES), 2, family.image(0, 1), 9])
    cached = "snapkv(keep=0.4, window=4)"
    (stand_in,), _ = hidden_by_hand(batch, "uniform_frames(keep=3)")
    done = []
    by_hand = [stand_in, *mmfast.Plan.parse(cached).methods]
    for plan in (f"uniform_frames(keep=3) + {cached}", by_hand):
        with mmfast.accelerate(family.model(), plan):
            done.append(generate(family.model(), batch.inputs, STEPS))
    assert torch.equal(done[0].tokens, done[1].tokens)
    assert (done[0].logits - done[1].logits).abs().max() < CLOSE
    with mmfast.accelerate(family.model(), "uniform_frames(keep=3)"):
        without = generate(family.model(), batch.inputs, STEPS)
    # The prompt itself is read in full, and evicted after it.
    assert (done[0].logits[:, 1:] - without.logits[:, 1:]).abs().max() > CLOSE


@every
def test_count_is_the_promised_one(family: Family, info: mmfast.MethodInfo) -> None:
    batch = family.batch([3, family.video(1, FRAMES), 4])
    (item,) = items_of(batch)
    for keep in (1, 0.4, 5):
        with mmfast.accelerate(family.model(), f"{info.name}(keep={keep})") as fast:
            first_logits(family.model(), batch.inputs)
            (record,) = fast.report().media
            text = str(fast.report())
            told = fast.report().to_dict()["media"][0]
        kept = info.method(keep=keep).keep_count(FRAMES)
        assert (record.frames, len(record.encoded_frames)) == (FRAMES, kept)
        assert (told["frames"], told["encoded_frames"]) == (FRAMES, record.encoded_frames.tolist())
        assert f"{kept} of {FRAMES} frames encoded" in text
        whole = torch.isin(item.layout.frame, record.encoded_frames) | item.layout.is_newline
        assert record.entered_indices.tolist() == whole.nonzero().squeeze(-1).tolist()


@every_reader
def test_only_chosen_frames_enter_the_vision_encoder(family: Family) -> None:
    """Of the video: the image beside it is encoded as ever."""
    model = family.model()
    batch = family.batch([3, family.video(1, FRAMES), 4])
    block = for_model(model).vision_blocks("video")[0]
    rows: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        rows.append(states.numel() // states.shape[-1])

    handle = block.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for call in (first_logits, lambda *both: generate(*both, 2)):
            rows.clear()
            call(model, batch.inputs)
            with mmfast.accelerate(model, "uniform_frames(keep=2)"):
                call(model, batch.inputs)
            whole, part = rows
            assert part * FRAMES == whole * 2
    finally:
        handle.remove()


@every_reader
def test_features_of_chosen_frames_are_those_of_the_whole_video(family: Family) -> None:
    """No tower of any family lets frames look at each other."""
    model, batch = family.model(), clips(family).alone(0)
    with torch.no_grad():
        whole = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
        with mmfast.accelerate(model, "scene_cut(keep=3)") as fast:
            part = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
            first_logits(model, batch.inputs)
            records = fast.report().media
    entered = torch.ones(len(whole), dtype=torch.bool)
    for item, record in zip(items_of(batch), records, strict=True):
        entered[item.slots] = False
        entered[item.slots[record.entered_indices]] = True
    assert len(part) < len(whole)
    assert (part - whole[entered]).abs().max() < 1e-5


@every
def test_batch_of_mixed_sizes_equals_one_by_one(family: Family, info: mmfast.MethodInfo) -> None:
    plan, batch = f"{info.name}(keep=2)", clips(family)
    together, _ = selected(family, plan)
    with mmfast.accelerate(family.model(), plan):
        for row in range(len(batch)):
            alone = generate(family.model(), batch.alone(row).inputs, STEPS)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert (alone.logits[0] - together.logits[row]).abs().max() < CLOSE


@every
def test_two_runs_are_equal(family: Family, info: mmfast.MethodInfo) -> None:
    plan = f"{info.name}(keep=2)"
    with mmfast.accelerate(family.model(), plan):
        again = generate(family.model(), clips(family).inputs, STEPS)
    assert torch.equal(again.logits, selected(family, plan)[0].logits)


@every_reader
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(family: Family, dtype: torch.dtype) -> None:
    model = family.model(dtype=dtype)
    with mmfast.accelerate(model, "aks(keep=2)"):
        done = generate(model, cast(clips(family).inputs, dtype), 2)
    assert bool(done.logits.isfinite().all())


@every
def test_remove_restores_the_model(family: Family, info: mmfast.MethodInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an exception inside the method."""
    model, batch, plan = family.model(), clips(family), f"{info.name}(keep=2)"
    before = untouched(family, "clips")
    stock, tables = census(model), registries()

    def fail(*_: object) -> None:
        raise RuntimeError("the method gave up")

    with mmfast.accelerate(model, plan):
        during = census(model)
        with monkeypatch.context() as patch:
            patch.setattr(info.method, "choose", fail)
            for call in (generate, first_logits):
                with pytest.raises(RuntimeError, match="the method gave up"):
                    call(model, batch.inputs)
        assert census(model) == during
        assert torch.equal(generate(model, batch.inputs, STEPS).logits, selected(family, plan)[0].logits)
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(generate(model, batch.inputs, STEPS).logits, before.logits)


@every_reader
def test_positions_follow_the_option(family: Family) -> None:
    """Where they have one dimension they can be renumbered, or keep the gaps; else they keep them."""
    for positions in ("keep", "compact"):
        plan = f"uniform_frames(keep=2, positions='{positions}')"
        if positions == "compact" and not family.renumbers:
            with pytest.raises(ValueError, match="positions='compact' is not possible for model type"):
                mmfast.accelerate(family.model(), plan)
            continue
        check(family, plan)
        same = positions == ("compact" if family.renumbers else "keep")
        default = selected(family, "uniform_frames(keep=2)")[0].logits
        assert torch.equal(selected(family, plan)[0].logits, default) is same


@pytest.mark.parametrize("info", METHODS, ids=case_id)
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if not f.has_video], ids=case_id)
def test_models_that_read_pictures_alone_are_refused(family: Family, info: mmfast.MethodInfo) -> None:
    model = family.model()
    stock = census(model)
    with pytest.raises(ValueError, match=f"method '{info.name}' chooses among the frames of a video, but models of"):
        mmfast.accelerate(model, f"{info.name}()")
    assert census(model) == stock


def test_the_count_of_a_plan_with_frames_is_not_predicted() -> None:
    shape = for_model(FAMILIES["qwen2_vl"].model()).shape
    assert mmfast.Plan.parse("uniform_frames(keep=4) + uniform(keep=8)").keep_counts(64, 8, shape) is None
