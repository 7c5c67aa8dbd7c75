"""What is said of each operation on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Thread

import pytest
import torch

from mmfast import kernels
from mmfast.kernels import dispatch

FOLDERS = {path.parent.name for path in Path(dispatch.__file__).parent.glob("*/__init__.py")}


def test_every_operation_has_a_state() -> None:
    found = kernels.available()
    assert set(found) == FOLDERS
    assert {"attention_stats", "compact", "rerotate"} <= set(found)


@pytest.mark.parametrize(
    ("missing", "gpu", "interpreted", "wanted"),
    [
        ("", True, False, "Triton"),
        ("", False, True, "Triton"),
        ("", False, False, "torch: no GPU"),
        ("Triton is not installed", True, False, "torch: Triton is not installed"),
    ],
)
def test_the_reason_is_given(
    missing: str, gpu: bool, interpreted: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_missing", lambda: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dispatch, "interpreted", lambda: interpreted)
    assert kernels.available()["compact"] == wanted


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


def test_a_reason_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_TOLD", set())
    with caplog.at_level(logging.INFO, "mmfast.kernels"):
        threads = [Thread(target=dispatch.chosen, args=("compact", "too wide")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        dispatch.chosen("compact", "too long")
    assert caplog.messages == ["compact runs in torch: too wide", "compact runs in torch: too long"]


def test_the_innermost_context_holds_and_in_its_thread_alone() -> None:
    found = []
    with kernels.use("triton"):
        with kernels.use("torch"):
            thread = Thread(target=lambda: found.append(dispatch.chosen("compact", "")))
            thread.start()
            thread.join()
            assert dispatch.chosen("compact", "") == "torch"
        assert dispatch.chosen("compact", "") == "triton"
        with pytest.raises(RuntimeError, match="too wide"):
            dispatch.chosen("compact", "too wide")
    assert found == ["triton"]


def test_the_choice_does_not_break_a_compiled_graph() -> None:
    def doubled(states: torch.Tensor) -> torch.Tensor:
        refusal = dispatch.refusal_of(states.double())
        return states * 2 if dispatch.chosen("compact", refusal) == "torch" else states

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
