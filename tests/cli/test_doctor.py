"""doctor: what works, what does not, and the cure; it must survive what it examines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmfast
from mmfast.cli import doctor, main
from mmfast.media.available import reader_states


def test_it_names_versions_readers_backends_and_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["mmfast"] == mmfast.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["readers"]["pyav"] == "works, the default"
    assert found["attention"]["sdpa"] == "works"
    assert found["families"]["llava"] == "works"
    assert any("attention_stats" in names for where, names in found["kernels"].items() if where.startswith("in "))
    assert set(found) == {"versions", "torchvision", "devices", "readers", "kernels", "attention", "families"}


def test_it_says_where_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"one": "Triton", "two": "torch: no GPU", "three": "Triton"}
    monkeypatch.setattr("mmfast.kernels.dispatch.available", lambda: runs)
    found = doctor.examine()["kernels"]
    assert found["in Triton"] == "one, three"
    assert found["in torch: no GPU"] == "two"


def test_it_groups_families_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"versions": {"torch": "9.9"}, "families": {"one": "works", "two": "works", "three": "too new"}}
    monkeypatch.setattr(doctor, "examine", lambda: states)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "one, two" in out
    assert "three - too new" in out


def test_a_broken_torchvision_is_named_with_its_cure(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import mmfast.cli, sys; sys.exit(mmfast.cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "BROKEN (operator torchvision::nms does not exist)" in found["torchvision"]["state"]
    major, minor = torch.__version__.split(".")[:2]
    assert major == "2"
    assert f"pip uninstall torchvision, or install torchvision 0.{int(minor) + 15}" in found["torchvision"]["cure"]
    assert found["readers"]["pyav"] == "works, the default"
    assert "works" not in found["families"].values()


def test_an_unusual_torch_gets_no_invented_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda package: "3.0.dev")
    assert doctor._matching_torchvision() == "the torchvision that belongs to this torch"
    monkeypatch.setattr(doctor, "_installed", lambda package: "2.13.0+cpu")
    assert doctor._matching_torchvision() == "torchvision 0.28"


def test_a_section_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr(doctor, "_devices", broken)
    found = doctor.examine()
    assert found["devices"] == {"cannot be examined": "RuntimeError: no driver"}
    assert found["families"]["llava"] == "works"


def test_readers_have_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("libavutil\nis missing")

    monkeypatch.setattr("mmfast.media.available.read_video", broken)
    assert reader_states()["pyav"] == "installed, but does not work: libavutil is missing"


def test_a_reader_that_another_stood_in_for_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(reader="pyav", warnings=("torchcodec failed (OSError: no FFmpeg); read with pyav",))
    monkeypatch.setattr("mmfast.media.available.find_spec", lambda package: object())
    monkeypatch.setattr("mmfast.media.available.read_video", lambda *_, **__: stand_in)
    states = reader_states()
    assert states["pyav"] == "works, the default"
    assert (
        states["torchcodec"] == "installed, but does not work: torchcodec failed (OSError: no FFmpeg); read with pyav"
    )
