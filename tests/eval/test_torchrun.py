"""``mmfast eval --shard auto`` under torchrun: a process that is killed and started again leaves the same table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmfast.cli.eval import _device_name
from mmfast.eval import evaluate, summarize
from mmfast.eval.datasets import task
from support.untimed_table import untimed

PLAN = "divprune(keep=64)"


def answers(folder: Path) -> int:
    """Lines in the files, their headers aside."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in folder.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("device", "shard", "cuda", "found"),
    [
        (None, "auto", True, "cuda:3"),
        (None, "auto", False, None),
        (None, "0/4", True, None),
        ("cuda:1", "auto", True, "cuda:1"),
    ],
)
def test_each_process_of_a_launcher_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str | None, shard: str, cuda: bool, found: str | None
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert _device_name(Namespace(device=device, shard=shard)) == found


@pytest.mark.slow
def test_two_processes_one_of_them_killed_are_one_run(tiny: Any, tmp_path: Path) -> None:
    questions = 9
    expected = evaluate(*tiny, [task("shapes-image")], [PLAN], out=tmp_path / "alone", limit=questions, name="embedded")
    out = tmp_path / "shards"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # The launcher starts both processes again when one is lost.
    command += ["--max-restarts", "1", "-m", "mmfast", "eval", "--shard", "auto", "--task", "shapes-image"]
    command += ["--limit", str(questions), "--plan", PLAN, "--out", str(out), "--device", "cpu"]
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 240
        while answers(out) < 6:
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        victim = next(child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        left = answers(out)
        assert launcher.wait(timeout=300) == 0, log.read_text()
    finally:
        launcher.kill()
    # Full, the plan and six baselines: it was killed in the middle, and nothing was asked twice.
    assert 6 <= left < 8 * questions
    assert answers(out) == 8 * questions
    assert len(list(out.glob("*0of2.jsonl"))) == len(list(out.glob("*1of2.jsonl"))) == 8
    assert untimed(summarize([out])) == untimed(expected)
