"""A whole run: cells, time, what is taken up again, and what stands in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.bench import Options, judged, run_bench
from mmfast.bench.goals import GOALS
from mmfast.bench.results import Results, machine_of
from mmfast.bench.suite import _cells
from mmfast.bench.timing import DeviceLostError

QUICK = Options(scale="tiny", level="kernels", match="max_min_select", repeats=1)
MACHINE = machine_of(torch.device("cpu"))


def keys(path: Path) -> list[str]:
    return list(json.loads(path.read_text())["cells"])


def test_a_killed_run_is_taken_up_again(tmp_path: Path) -> None:
    path, measured = tmp_path / "r.json", []

    def killed(key: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(QUICK, path, before_cell=killed)
    assert keys(path) == ["tiny/kernel/max_min_select/64 tokens/b1"]
    first = json.loads(path.read_text())["cells"]
    run_bench(QUICK, path, before_cell=lambda key, done, total: measured.append((key, done, total)))
    assert measured == [("tiny/kernel/max_min_select/64 tokens/b2", 1, 2)]
    content = json.loads(path.read_text())
    assert content["cells"].items() >= first.items()
    assert [cell["call"] for cell in content["cells"].values()] == [0, 1]
    assert [call["ceilings"].keys() for call in content["calls"]] == [{"copy", "matmul"}] * 2


def test_no_cell_is_begun_after_the_time(tmp_path: Path) -> None:
    results = run_bench(Options(**{**vars(QUICK), "seconds": 1e-9}), tmp_path / "r.json")
    assert results.content["cells"] == {}


def test_what_failed_is_tried_again_and_what_lacked_memory_is_not(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", MACHINE)
    results.begin()
    results.add("failed", {"failed": "ValueError: no"})
    results.add("lost", {"lost": "CUDA error"})
    results.add("full", {"out_of_memory": "OutOfMemoryError"})
    assert [results.finished(key) for key in ("failed", "lost", "full", "new")] == [False, True, True, False]


def test_a_failing_cell_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.bench import suite

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(suite, "kernel_cell", broken)
    content = run_bench(QUICK, tmp_path / "r.json").content
    assert [cell["failed"] for cell in content["cells"].values()] == ["RuntimeError: broken"] * 2


def test_a_lost_device_ends_the_run_and_its_cell_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmfast.bench import suite

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise DeviceLostError("illegal memory access")

    path = tmp_path / "r.json"
    monkeypatch.setattr(suite, "kernel_cell", lost)
    with pytest.raises(DeviceLostError):
        run_bench(QUICK, path)
    assert [cell["lost"] for cell in json.loads(path.read_text())["cells"].values()] == ["illegal memory access"]
    monkeypatch.undo()
    assert len(run_bench(QUICK, path).content["cells"]) == 2


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Results(path, {**MACHINE, "torch": "1.0"}).begin()
    with pytest.raises(ValueError, match=r"measured with torch='1\.0'.*name another file"):
        Results(path, MACHINE)


@pytest.mark.parametrize("text", ["", "[]", '{"machine": {}}'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="name another file"):
        Results(path, MACHINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "huge"}, "scale='huge' must be one of"),
        ({"level": "gpu"}, "level='gpu' must be one of"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"seconds": 0.0}, r"seconds=0\.0 must be positive"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**changes)


def test_goals_are_about_cells_that_there_are_and_come_first() -> None:
    # Nothing is run or built on that device: it is only asked for its kind.
    every = [cell.key for cell in _cells(Options(device=torch.device("cuda"), dtype=torch.bfloat16), [])]
    wanted = {goal.cell for goal in GOALS}
    assert wanted == set(every[: len(wanted)])
    assert len(every) == len(set(every))


def test_goals_are_judged() -> None:
    slow = {"median": 2.0}
    cell = {"sides": {"triton": {"seconds": {"median": 1.0}, "share_of_copy": 0.5}, "loop": {"seconds": slow}}}
    cells = {
        "real/kernel/max_min_select/LLaVA-1.5-7B/b32": cell,
        "real/kernel/gather_decode/LLaVA-NeXT-Video-7B/b8": cell,
        "real/kernel/max_min_select/LLaVA-NeXT-Video-7B/b1": {"sides": {"triton": {"seconds": {"median": 0.004}}}},
        "real/kernel/quant_decode/LLaVA-NeXT-Video-7B/b8": {"out_of_memory": "no"},
    }
    found = {one.goal.text.split(":")[0]: one for one in judged({"machine": {"kind": "cuda"}, "cells": cells})}
    assert found["max-min selection of 64 of 576 tokens at batch 32"].to_dict()["value"] == 2.0
    assert found["max-min selection of 64 of 576 tokens at batch 32"].verdict == "missed"
    assert found["gather_decode on 12,544 entries at batch 8"].verdict == "missed"
    assert found["max-min selection of 640 of 12,544 tokens"].verdict == "reached"
    assert found["quant_decode on 12,544 entries at batch 8"].verdict == "not measured"
    assert {one.verdict for one in judged({"machine": {"kind": "cpu"}, "cells": cells})} == {"not measured"}
