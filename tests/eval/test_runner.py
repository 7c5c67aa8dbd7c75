"""One question after the other: answers, counts, costs and failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import mmfast
from mmfast.adapters import prepare
from mmfast.eval import Sample, evaluate_shard
from mmfast.eval.datasets import task
from mmfast.eval.loading import batches, count_selected, select
from mmfast.eval.records import Record
from mmfast.eval.runner import Runner, fingerprint
from mmfast.media import sample as media_sample
from mmfast.media import video
from support.toy_task import Toy

IMAGES = task("shapes-image", num_questions=12)
PLAN = "divprune(keep=64)"


def asked(name: str, **options: Any) -> Sample:
    return Sample(name, "what color is the star?", ("red",), details={"one": 1.0}, **options)


def test_records_hold_what_the_model_and_the_report_say(tiny: Any) -> None:
    model, processor = tiny
    (record,) = evaluate_shard(model, processor, IMAGES, PLAN, limit=1)
    first = next(IMAGES.samples())
    inputs = prepare(processor, first.question, list(first.images))
    with mmfast.accelerate(model, PLAN) as fast:
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    report = fast.report()
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert (record.question_id, record.prediction, record.error) == (first.sample_id, text, "")
    assert (record.n_visual_in, record.n_visual_kept, record.n_visual_layer_average) == (256, 64, 64.0)
    assert record.n_new == output.shape[1] - inputs["input_ids"].shape[1]
    assert record.n_text == inputs["input_ids"].shape[1] - 256
    assert (record.prefill_macs, record.full_prefill_macs) == (report.flops, report.full_flops)
    assert record.prefill_flops == 2 * report.flops
    assert (record.kv_bytes, record.full_kv_bytes) == (report.kv_bytes, report.full_kv_bytes)
    parts = (record.encoder_ms, record.reduce_ms, record.prefill_ms)
    assert all(part is not None and part > 0 for part in parts)
    assert record.ttft_ms is not None
    assert record.e2e_ms is not None
    assert sum(part or 0 for part in parts) <= record.ttft_ms <= record.e2e_ms
    assert record.peak_memory_bytes is None


def test_a_batch_answers_as_one_by_one(tiny: Any) -> None:
    timed = {"ttft_ms", "e2e_ms", "decode_tok_s", "encoder_ms", "reduce_ms", "prefill_ms", "preprocess_ms"}

    def plain(record: Record) -> Record:
        return replace(record, **dict.fromkeys(timed | {"kv_bytes", "full_kv_bytes"}))

    alone = [plain(record) for record in evaluate_shard(*tiny, IMAGES, PLAN, limit=4)]
    together = list(evaluate_shard(*tiny, IMAGES, PLAN, limit=4, batch=4))
    assert [plain(record) for record in together] == alone
    assert together[0].e2e_ms is not None
    assert together[0].ttft_ms is None


def test_the_plan_is_off_afterwards(tiny: Any) -> None:
    records = evaluate_shard(*tiny, IMAGES, PLAN, limit=3)
    next(records)
    records.close()
    (full,) = evaluate_shard(*tiny, IMAGES, "full", limit=1)
    assert full.n_visual_kept == 256


def test_failures_count_as_wrong_and_say_why(tiny: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64))
    toy = Toy(
        (
            asked("missing", images=(tmp_path / "gone.png",)),
            asked("placeholder", images=(picture,)),
            asked("scorer", images=(picture,)),
            asked("fine", images=(picture,)),
        ),
        refuses="scorer",
    )
    toy = replace(toy, given=(toy.given[0], replace(toy.given[1], question="<image>?"), *toy.given[2:]))
    for batch in (1, 4):
        records = {record.question_id: record for record in evaluate_shard(*tiny, toy, batch=batch)}
        assert set(records) == {"missing", "placeholder", "scorer", "fine"}
        assert "gone.png" in records["missing"].error
        assert "placeholder" in records["placeholder"].error
        assert records["scorer"].error == "the scorer failed: ArithmeticError: the scorer is out of order"
        assert records["scorer"].prediction != ""
        assert {record.score for record in records.values() if record.error} == {0.0}
        assert records["missing"].scored_details == {"weight": 2.0}
        assert records["fine"].error == ""


def test_a_question_that_breaks_the_model_leaves_its_batch_alone(tiny: Any, monkeypatch: Any) -> None:
    model, processor = tiny
    samples = list(IMAGES.samples())[:3]
    generate, wanted = model.generate, prepare(processor, samples[1].question, list(samples[1].images))

    def breaking(**inputs: Any) -> Any:
        if any(torch.equal(row, wanted["pixel_values"][0]) for row in inputs["pixel_values"]) and (
            inputs["input_ids"].shape[0] > 1 or torch.equal(inputs["input_ids"], wanted["input_ids"])
        ):
            raise RuntimeError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", breaking)
    records = list(Runner(model, processor, batch=3).records(IMAGES, "full", samples))
    assert [record.error for record in records] == ["", "RuntimeError: out of memory", ""]


def test_clips_show_all_their_frames(tiny: Any) -> None:
    clips = task("shapes-video", num_questions=1, num_frames=3)
    (record,) = evaluate_shard(*tiny, clips, "uniform(keep=16)")
    assert (record.n_visual_in, record.n_visual_kept) == (3 * 256, 3 * 16)
    assert record.question_id == f"{record.cluster}/{record.category}"


@pytest.mark.parametrize(("start", "end"), [(0.0, None), (1.0, 2.5), (2.0, None), (90.0, 91.0)])
def test_video_files_are_read_once_where_the_question_looks(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, start: float, end: float | None
) -> None:
    film = asked("film", video=media_sample("bigbuckbunny.mp4"), start=start, end=end)
    opened = Mock(wraps=video.open_source)
    monkeypatch.setattr(video, "open_source", opened)
    (record,) = evaluate_shard(*tiny, Toy((film,)), frames=2)
    assert record.error == ""
    assert opened.call_count == 1
    # A stretch beyond the end of the file shows its last frame.
    assert record.n_visual_in == (256 if start > 80 else 512)


def test_text_alone_has_no_visual_tokens(tiny: Any) -> None:
    toy = Toy((asked("seen", images=(Image.new("RGB", (64, 64)),)), asked("told")))
    seen, told = evaluate_shard(*tiny, toy, "full")
    assert seen.n_visual_in == 256
    assert (told.error, told.n_visual_in, told.prefill_macs, told.kv_bytes) == ("", None, None, None)
    assert told.ttft_ms is not None


def test_selection_is_the_same_for_everybody() -> None:
    everything = [sample.sample_id for sample in IMAGES.samples()]
    parts = [[s.sample_id for s in select(IMAGES, limit=10, shard=(i, 3))] for i in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(everything[:10])
    assert [len(part) for part in parts] == [count_selected(IMAGES, limit=10, shard=(i, 3)) for i in range(3)]
    drawn = [[s.sample_id for s in select(IMAGES, limit=5, seed=seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) <= set(everything)
    assert len(list(select(IMAGES, limit=99, seed=1))) == 12


def test_selection_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="shard=2/2 must be one of 0/2 to 1/2"):
        list(select(IMAGES, shard=(2, 2)))
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        list(select(IMAGES, limit=0))
    with pytest.raises(ValueError, match="'toy' has two samples with the id 'q'"):
        list(select(Toy((asked("q"), asked("q")))))


def test_batches_are_of_one_kind() -> None:
    picture = Image.new("RGB", (8, 8))
    mixed = [asked(f"{i}{n}", images=(picture,) * n) for i in range(3) for n in (1, 2)]
    groups = list(batches(mixed, 2))
    assert [[len(sample.images) for sample in group] for group in groups] == [[1, 1], [2, 2], [1], [2]]


def test_other_weights_have_another_fingerprint(tiny: Any) -> None:
    model, _ = tiny
    before = fingerprint(model)
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        weight.data.mul_(1.5)
        assert fingerprint(model) != before
    finally:
        weight.data.copy_(kept)
    assert fingerprint(model) == before
    assert fingerprint(mmfast.load_default(dtype="bfloat16")[0]) != before


@pytest.mark.parametrize("field", ["batch", "max_new_tokens", "frames"])
def test_numbers_out_of_range_are_refused(tiny: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        list(evaluate_shard(*tiny, IMAGES, **{field: 0}))


def test_a_model_is_called_as_it_was_asked_for_or_by_its_folder(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny
    assert Runner(model, processor).name == "embedded"
    assert Runner(model, processor, name="mine").name == "mine"
    for source, name in (("org/some-model", "some-model"), ("", type(model).__name__)):
        monkeypatch.setattr(model.config, "_name_or_path", source)
        assert Runner(model, processor).name == name
