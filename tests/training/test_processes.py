"""Several processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfast.training import checkpoints
from mmfast.training.trainer import read_log, train
from support import together

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")


def launched(*folders: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run the small training on the CPU, as a launcher would, in a process for each folder."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(folders))}
    running = []
    for number, folder in enumerate(folders):
        own = {**common, "RANK": str(number), "LOCAL_RANK": str(number), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, together.__file__, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=own, text=True, **pipes))
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(running, said, strict=True)]


def test_processes_without_a_folder_in_common_are_refused(tmp_path: Path) -> None:
    for process, steps in enumerate((2, 1)):
        folder = tmp_path / str(process) / "1"
        train(together.Uneven(), together.settings(), folder, stop_after=steps, progress=False)
        run = checkpoints.found(folder)[-1] / "run.json"
        run.write_text(run.read_text().replace('"processes": 1', '"processes": 2'))
    for done in launched(tmp_path / "0", tmp_path / "1"):
        assert done.returncode != 0
        assert "the processes found checkpoints of steps 2, 1 in" in done.stderr


def test_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Shares of a step count by what they hold, in the gradient and in the log."""
    for done in launched(tmp_path, tmp_path):
        assert done.returncode == 0, done.stderr
    alone = together.Uneven()
    train(alone, together.settings(), tmp_path / "alone", progress=False)
    wanted = [line["loss"] for line in read_log(tmp_path / "alone")]
    assert len(wanted) == 4
    for accumulate in together.ACCUMULATED:
        folder = tmp_path / str(accumulate)
        learned = load_file(checkpoints.found(folder)[-1] / "weights.safetensors")
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(learned[name], weight, rtol=1e-5, atol=1e-6)
        assert [line["loss"] for line in read_log(folder)] == pytest.approx(wanted, rel=1e-4)
