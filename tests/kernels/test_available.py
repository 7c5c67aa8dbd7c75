"""What is said of each operation on this machine."""

from __future__ import annotations

from pathlib import Path

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
