"""The page of gradio: where it is served, what it leaves behind, and what it says without gradio."""

from __future__ import annotations

import socket
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from mmfast.cli import main
from mmfast.ui.app import _values, serving
from mmfast.ui.session import Pane, Session


def test_without_gradio_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 2
    assert "pip install 'mmfast[serve]'" in capsys.readouterr().err


def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--port", "70000"]) == 2
    assert "--port=70000 must be 0 to 65535" in capsys.readouterr().err


def test_what_a_pane_says_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    answer, page, _ = _values(Pane(answer=evil, note=evil, failed=True, figures=((evil, evil),)))
    # The answer goes into a text field, which shows it as it is.
    assert answer == evil
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3


def test_it_is_served_on_this_machine_alone_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the extra 'serve' is not installed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(Session(None, None), title="<b>none</b>", port=0) as address:
        assert address.startswith("http://127.0.0.1:")
        (folder,) = tmp_path.glob("mmfast-ui-*")
        assert tempfile.gettempdir() == str(folder)
        with urllib.request.urlopen(address) as answer:
            content = answer.read().decode()
        assert "mmfast" in content
        # Nothing is loaded from elsewhere before the user does anything.
        assert "fonts.googleapis.com/css" not in content
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(OSError, match=str(port)), serving(Session(None, None), title="second", port=port):
            pass
        assert tempfile.gettempdir() == str(folder)
    assert list(tmp_path.iterdir()) == []
    assert tempfile.tempdir == str(tmp_path)
    with socket.socket() as late:
        assert late.connect_ex(("127.0.0.1", port)) != 0
