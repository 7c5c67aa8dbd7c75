"""Sweeps: baselines of equal token count, and the same table after a kill, a resume or a merge."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmfast
from mmfast.adapters import prepare
from mmfast.eval import Progress, Sample, Table, evaluate, summarize
from mmfast.eval.baselines import SEEDS, baseline_name
from mmfast.eval.datasets import task
from mmfast.eval.results import ResultsFile, merge
from mmfast.eval.runner import Runner
from support.toy_task import Toy

IMAGES = task("shapes-image", num_questions=6)
COUNTED = ("n_visual_in", "n_visual_kept", "n_visual_layer_average", "prefill_macs", "prefill_flops", "kv_bytes")


def untimed(table: Table) -> Any:
    """Everything but what a clock says."""
    rows = json.loads(json.dumps(table.to_dict()["rows"]))
    for row in rows:
        row["costs"] = {name: row["costs"][name] for name in COUNTED}
    return rows, table.comparisons, table.notes


def test_every_plan_has_its_baselines_at_the_same_tokens(tiny: Any, tmp_path: Path) -> None:
    # What is left on average over the layers: 64, and 256 / 4 + 16 * 3 / 4 = 76.
    plans = ["divprune(keep=64)", "fastv(keep=16, layer=0.25)"]
    table = evaluate(*tiny, [IMAGES], plans, out=tmp_path, limit=1, name="tiny")
    tokens = {row.plan: row.costs["n_visual_layer_average"] for row in table.rows}
    assert [row.plan for row in table.rows[:3]] == ["full", "fastv(keep=16, layer=0.25)", "divprune(keep=64)"]
    for plan, kept in (("divprune(keep=64)", 64), ("fastv(keep=16, layer=0.25)", 76)):
        assert tokens[plan] == kept
        assert tokens[f"random(keep={kept})"] == tokens[f"uniform(keep={kept})"] == kept
        # On a 16 x 16 grid the nearest below are 8 x 8 and 9 x 8.
        assert tokens[f"pool2d(keep={kept})"] == tokens[f"downsample(keep={kept})"] == (64 if kept == 64 else 72)
        others = {found.other for found in table.comparisons if found.plan == plan}
        names = ("random", "uniform", "downsample", "pool2d")
        assert others == {"full", *(f"{name}(keep={kept})" for name in names)}
    assert {row.seeds for row in table.rows if row.baseline == "random"} == {SEEDS}
    assert len(table.rows) == 3 + 2 * 4
    assert any("pool2d(keep=76) leaves 72.0 visual tokens" in note for note in table.notes)


def test_baselines_are_not_run_twice_nor_for_what_keeps_all_tokens(tiny: Any, tmp_path: Path) -> None:
    plans = ["uniform(keep=64)", "prompt_lookup()", "divprune(keep=64)"]
    table = evaluate(*tiny, [IMAGES], plans, out=tmp_path / "a", limit=1)
    assert sorted(row.plan for row in table.rows if not row.baseline) == ["divprune(keep=64)", "prompt_lookup()"]
    assert sum(row.baseline == "uniform" for row in table.rows) == 1
    table = evaluate(*tiny, [IMAGES], plans[1:2], out=tmp_path / "b", limit=1)
    assert [row.plan for row in table.rows] == ["full", "prompt_lookup()"]
    table = evaluate(*tiny, [IMAGES], plans[2:], out=tmp_path / "c", limit=1, with_baselines=False)
    assert [row.plan for row in table.rows] == ["full", "divprune(keep=64)"]


def test_names_of_baselines() -> None:
    assert baseline_name("full") == "full"
    assert baseline_name("random(keep=3, seed=1)") == "random"
    assert baseline_name("random_in_llm(keep=3, layer=1)") == ""


def test_killed_and_resumed_gives_the_same_table(tiny: Any, tmp_path: Path) -> None:
    options = {"limit": 5, "with_baselines": False, "name": "embedded"}
    plans = ["uniform(keep=32)", "divprune(keep=64)"]
    expected = evaluate(*tiny, [task("shapes-image")], plans, out=tmp_path / "whole", **options)
    out = tmp_path / "killed"
    words = ["eval", "--task", "shapes-image", "--limit", "5", "--no-baselines", "--out", str(out), "--device", "cpu"]
    words += [word for plan in plans for word in ("--plan", plan)]
    command = [sys.executable, "-c", f"import sys; from mmfast.cli import main; sys.exit(main({words!r}))"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # One header for each of three files, then answers.
    while sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl")) < 3 + 4:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    done = sum(content.count(b"\n") - 1 for content in left.values())
    assert 4 <= done < 15
    seen: list[Progress] = []
    resumed = evaluate(*tiny, [task("shapes-image")], plans, out=out, progress=seen.append, **options)
    assert untimed(resumed) == untimed(expected)
    assert seen[-1].done == seen[-1].total == 15 - done
    for name, content in left.items():
        complete = content[: content.rfind(b"\n") + 1]
        assert (out / name).read_bytes().startswith(complete)


def test_a_finished_sweep_asks_nothing(tiny: Any, tmp_path: Path) -> None:
    first = evaluate(*tiny, [IMAGES], [], out=tmp_path, limit=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    seen: list[Progress] = []
    assert evaluate(*tiny, [IMAGES], [], out=tmp_path, limit=2, progress=seen.append) == first
    assert seen == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    more = evaluate(*tiny, [IMAGES], [], out=tmp_path, limit=3, progress=seen.append)
    assert (len(seen), more.rows[0].n) == (1, 3)


def test_shards_together_are_one_run(tiny: Any, tmp_path: Path) -> None:
    plans, options = ["divprune(keep=16)"], {"batch": 2, "limit": 5}
    whole = evaluate(*tiny, [IMAGES], plans, out=tmp_path / "whole", **options)
    for index, answered in ((1, 2), (0, 5)):
        part = evaluate(*tiny, [IMAGES], plans, out=tmp_path / "parts", shard=(index, 2), **options)
        assert {row.n for row in part.rows} == {answered}
    # Another copy of a shard changes nothing.
    copied = next((tmp_path / "parts").glob("*0of2*"))
    (tmp_path / "copy.jsonl").write_bytes(copied.read_bytes())
    merged = summarize([tmp_path / "parts", tmp_path / "copy.jsonl"])
    assert untimed(merged) == untimed(whole)
    assert len(list((tmp_path / "parts").iterdir())) == 2 * len(list((tmp_path / "whole").iterdir()))


def test_failed_samples_are_counted_and_own_summaries_used(tiny: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    good = [Sample(f"q{i}", "is it?", ("",), images=(picture,), details={"one": 1.0}) for i in range(3)]
    bad = Sample("bad", "is it?", ("",), images=(tmp_path / "gone.png",), details={"one": 1.0})
    toy = Toy((*good, bad))
    (row,) = evaluate(*tiny, [toy], [], out=tmp_path).rows
    # Three right and one failed; this task doubles its scores. A failure has an empty text, which is no answer.
    assert (row.n, row.failed, row.metric, row.score) == (4, 1, "doubled", 150.0)
    assert row.interval.method == "bootstrap"
    assert row.interval.low < 150 < row.interval.high <= 200
    unknown = summarize([tmp_path])
    assert unknown.rows[0].score == 75.0
    assert "no task 'toy' is known here" in unknown.notes[0]


def test_hard_questions_are_those_that_down_sampling_loses(tiny: Any, tmp_path: Path) -> None:
    plan = "divprune(keep=16)"
    table = evaluate(*tiny, [task("shapes-image")], [plan], out=tmp_path, limit=12, batch=12)
    scores = {run.header.plan: {r.question_id: r.score for r in run.records} for run in merge([tmp_path])}
    hard = [name for name, s in scores["full"].items() if s == 1 and scores["downsample(keep=16)"][name] == 0]
    row = next(row for row in table.rows if row.plan == plan)
    assert hard
    assert row.hard_n == len(hard)
    assert row.hard_score == pytest.approx(100 * sum(scores[plan][name] for name in hard) / len(hard))
    full = next(row for row in table.rows if row.baseline == "full")
    assert row.relative == pytest.approx(row.score / full.score)
    down = next(found for found in table.comparisons if found.other == "downsample(keep=16)")
    both = [scores[plan][name] - scores["downsample(keep=16)"][name] for name in scores["full"]]
    assert down.difference.mean == pytest.approx(100 * sum(both) / len(both))


def test_unfit_plans_and_tasks_are_refused_first(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer"):
        evaluate(*tiny, [IMAGES], ["divprune(keep=64)", "fastv(keep=4, layer=9)"], out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="tasks must have different names"):
        evaluate(*tiny, [IMAGES, task("shapes-image")], [], out=tmp_path)


@pytest.mark.slow
def test_the_harness_costs_at_most_two_percent(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    questions, plan = 40, "divprune(keep=64)"
    shapes = task("shapes-image", num_questions=questions)
    samples = list(shapes.samples())

    def bare() -> None:
        with mmfast.accelerate(model, plan):
            for sample in samples:
                inputs = prepare(processor, sample.question, list(sample.images))
                output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
                text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                shapes.score(sample, text)

    runner = Runner(model, processor, max_new_tokens=10)

    def harness(turn: int) -> None:
        with ResultsFile(tmp_path / f"{turn}.jsonl", runner.header(shapes, plan)) as file:
            for start in range(0, questions, 8):
                prompts = [prompt for sample in samples[start : start + 8] for prompt in runner.prompts([sample])]
                for record in runner.answer(shapes, plan, prompts):
                    file.append(record)

    seconds: dict[str, list[float]] = {"bare": [], "harness": []}
    for turn in range(6):
        for name, work in (("bare", bare), ("harness", lambda turn=turn: harness(turn))):
            begin = time.process_time()
            work()
            seconds[name] += [time.process_time() - begin] if turn else []
    # The least disturbed runs: other work on the machine only ever adds.
    assert min(seconds["harness"]) <= 1.02 * min(seconds["bare"])
