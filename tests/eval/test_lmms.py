"""mmfast inside lmms-eval: what its task list gets is what the model says by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets import task
from mmfast.eval.lmms_arguments import cut, generation_options, read_arguments
from mmfast.media import read_video, write_video

ROOT = Path(__file__).parents[2]
ABSENT = "lmms_eval is not installed: pip install 'mmfast[lmms]', best in an environment of its own"
needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason=ABSENT)
PLAN = "divprune(keep=64) + fastv(keep=16, layer=1)"
QUESTIONS = 6

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
doc_to_target: answer
process_results: !function functions.results
generation_kwargs: {{max_new_tokens: 10, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """\
from PIL import Image


def visual(document):
    path = document["file"]
    return [path if path.endswith(".mp4") else Image.open(path).convert("RGB")]


def text(document, lmms_eval_specific_kwargs=None):
    return "<image>" + document["question"]


def results(document, answers):
    return {"right": float(answers[0].strip() == document["answer"])}
"""


def test_arguments_hold_plans() -> None:
    assert read_arguments(f"pretrained=embedded,plan={PLAN},device=cuda:1") == {
        "pretrained": "embedded",
        "plan": PLAN,
        "device": "cuda:1",
    }
    assert read_arguments(' plan="fastv(keep=16, layer=1)" , frames=4') == {
        "plan": "fastv(keep=16, layer=1)",
        "frames": 4,
    }
    assert read_arguments("") == {}
    with pytest.raises(ValueError, match="'embedded' must be NAME=VALUE"):
        read_arguments("embedded,frames=4")


def test_only_a_temperature_samples() -> None:
    assert generation_options({"temperature": 0.0, "top_p": 0.9, "do_sample": True})[0] == {
        "max_new_tokens": 1024,
        "do_sample": False,
    }
    sampled, until = generation_options({"temperature": 0.7, "top_p": 0.9, "until": ["a", "b"], "max_new_tokens": 3})
    assert sampled == {"max_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert until == ["a", "b"]
    assert cut("xbya", until) == "x"
    with pytest.raises(ValueError, match="max_gen_tokens cannot be passed on; known are"):
        generation_options({"max_gen_tokens": 3})


def test_the_entry_point_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    found = EntryPoint("mmfast", declared["mmfast"], "lmms_eval.models")
    if find_spec("lmms_eval") is None:
        with pytest.raises(ImportError, match=r"pip install 'mmfast\[lmms\]'"):
            found.load()
    else:
        assert found.load()().model_id == "mmfast"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, str]]]]:
    """A folder with two tasks of rendered shapes as lmms-eval reads them, and their questions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "functions.py").write_text(FUNCTIONS)
    found: dict[str, list[dict[str, str]]] = {}
    for kind, suffix, count in (("image", "png", QUESTIONS), ("video", "mp4", 2)):
        rows = []
        for number, sample in enumerate(task(f"shapes-{kind}", num_questions=count).samples()):
            path = folder / f"{kind}{number}.{suffix}"
            if kind == "image":
                sample.images[0].save(path)
            else:
                write_video(path, list(sample.frames), fps=4)
            rows.append({"file": str(path), "question": sample.question, "answer": sample.answers[0]})
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"mmfast_{kind}.yaml").write_text(TASK.format(name=f"mmfast_{kind}", data=data))
        found[f"mmfast_{kind}"] = rows
    return folder, found


def asked_alone(tiny: tuple[Any, Any], row: dict[str, str], plan: str) -> str:
    """What the model says to one question, without lmms-eval."""
    model, processor = tiny
    if row["file"].endswith(".mp4"):
        video = read_video(row["file"], num_frames=4)
        inputs = prepare(processor, row["question"], None, video.images(), fps=len(video) / video.duration)
    else:
        from PIL import Image

        inputs = prepare(processor, row["question"], Image.open(row["file"]).convert("RGB"))
    with mmfast.accelerate(model, plan):
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@needs_lmms_eval
@pytest.mark.parametrize(("plan", "batch"), [(PLAN, 2), ("full", 1)])
def test_lmms_eval_runs_its_tasks_on_a_plan(
    tiny: tuple[Any, Any], documents: Any, tmp_path: Path, plan: str, batch: int
) -> None:
    folder, tasks = documents
    words = ["--model", "mmfast", "--model_args", f"pretrained=embedded,plan={plan},frames=4,device=cpu"]
    words += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--batch_size", str(batch)]
    words += ["--output_path", str(tmp_path), "--log_samples", "--verbosity", "DEBUG"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.rglob("*_results.json")
    scores = json.loads(report.read_text())["results"]
    for name, rows in tasks.items():
        (file,) = tmp_path.rglob(f"*_samples_{name}.jsonl")
        lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
        # Its log takes the blanks off.
        said = [line["filtered_resps"] for line in lines]
        assert said == [asked_alone(tiny, row, plan).strip() for row in rows]
        right = sum(text == row["answer"] for text, row in zip(said, rows, strict=True))
        assert scores[name]["right,none"] == pytest.approx(right / len(rows))
        assert right > 0


@needs_lmms_eval
def test_what_the_plug_in_cannot_do_is_refused() -> None:
    from mmfast.eval.lmms import LmmsModel

    model = LmmsModel.create_from_arg_string("plan=divprune(keep=64)", {"batch_size": 1, "device": "cpu"})
    assert model.plan.to_text() == "divprune(keep=64)"
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(ValueError, match="whose output_type is generate_until"):
            ask([])
    with pytest.raises(ValueError, match="batch_size=auto must be a whole number"):
        LmmsModel.create_from_arg_string("", {"batch_size": "auto", "device": "cpu"})
    with pytest.raises(TypeError, match="plann"):
        LmmsModel.create_from_arg_string("plann=full")
