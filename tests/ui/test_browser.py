"""The pages in a real browser: the one of ``mmfast ui``, and those of the reports with their scripts at work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfast.cli import main
from mmfast.eval.datasets.shapes import render_clip
from mmfast.media import write_video
from support.browser import CHROMIUM, Browser, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]

PHONE = (420, 800)
QUESTION = "what color is the ring?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "clip.mp4"
    write_video(path, list(render_clip(3, num_frames=8).frames), fps=8)
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    pytest.importorskip("websockets", reason="a browser is steered over websockets, which come with the extra 'serve'")
    with Browser(tmp_path / "profile") as found:
        yield found


def shown(browser: Browser, selector: str) -> int:
    """Count elements that take up room."""
    return int(
        browser.run(f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length).length")
    )


def assert_fits_a_phone(browser: Browser) -> None:
    browser.send(
        "Emulation.setDeviceMetricsOverride", width=PHONE[0], height=PHONE[1], deviceScaleFactor=1, mobile=True
    )
    assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
    browser.send("Emulation.clearDeviceMetricsOverride")


def test_two_plans_answer_in_the_page(browser: Browser, clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra 'serve' is not installed")
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "mmfast", "ui", "--port", "0", "--device", "cpu", "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        text=True,
    )
    try:
        assert server.stdout is not None
        text = ""
        while "}" not in text:
            line = server.stdout.readline()
            assert line, "the server ended"
            text += line
        address = json.loads(text)["url"]
        browser.open(address)
        wait_for(lambda: browser.run("!!document.querySelector('#media input[type=file]')"), 60)
        browser.choose_files("#media input[type=file]", clip)
        wait_for(lambda: "clip.mp4" in browser.run("document.querySelector('#media').innerText"), 60)
        browser.type("#question textarea, #question input", QUESTION)
        browser.run("document.querySelector('#ask').click()")
        wait_for(lambda: shown(browser, "#figures-1 table"), 120)
        answers = browser.run("[0, 1].map(i => document.querySelector(`#answer-${i} textarea`).value)")
        assert all(answers)
        figures = browser.run("[0, 1].map(i => document.querySelector(`#figures-${i}`).innerText)")
        assert "2048 of 2048" in figures[0]
        assert "512 of 2048" in figures[1]
        wait_for(lambda: browser.run("document.querySelectorAll('.thumbnail-lg, .gallery-item img').length") >= 16, 60)
        # A plan that does not exist is one line, the other side answers all the same.
        browser.type("#plan-1 input", "divprun(keep=3)")
        browser.run("document.querySelector('#plan-1 input').blur()")
        browser.run("document.querySelector('#ask').click()")
        wait_for(lambda: shown(browser, "#figures-1 .failed"), 120)
        assert "did you mean divprune" in browser.run("document.querySelector('#figures-1').innerText")
        assert [one for one in browser.requests if not one.startswith((address, "data:", "blob:", "about:"))] == []
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 130
        assert not list(folder.rglob("*.mp4"))
        assert not list(folder.glob("mmfast-ui-*"))
    finally:
        server.kill()
        server.wait()


def test_the_page_of_an_evaluation_can_be_searched(browser: Browser, tmp_path: Path) -> None:
    # One token of a picture is too little: questions are lost.
    words = ("--task", "shapes-image", "--limit", "6", "--plan", "divprune(keep=1)", "--device", "cpu")
    page = tmp_path / "page.html"
    assert main(["eval", *words, "--no-baselines", "--out", str(tmp_path / "results"), "--report", str(page)]) == 0
    browser.open(page.as_uri())
    assert shown(browser, ".filter") == 1
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    rows = shown(browser, ".questions tbody tr")
    assert rows >= 1
    browser.type(".filter input", "no such words")
    assert shown(browser, ".questions tbody tr") == 0
    assert browser.run("document.querySelector('.filter output').innerText") == f"0 of {rows}"
    browser.type(".filter input", browser.run("document.querySelector('.questions td:nth-child(2)').textContent"))
    assert shown(browser, ".questions tbody tr") >= 1
    assert_fits_a_phone(browser)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]


def test_layers_can_be_stepped_through(browser: Browser, clip: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = (str(clip), QUESTION, "--plan", "divprune(keep=128) + pyramiddrop()", "--repeats", "1", "--frames", "2")
    assert main(["compare", *words, "--max-new-tokens", "2", "--device", "cpu", "--out", str(page)]) == 0
    browser.open(page.as_uri())
    assert (shown(browser, ".step"), shown(browser, ".time")) == (1, 1)
    layers = int(browser.run("document.querySelector('.step input').max"))
    stages = []
    for step in range(layers + 1):
        browser.run(
            f"(() => {{ const s = document.querySelector('.step input'); s.value = {step}; "
            "s.dispatchEvent(new Event('input')); })()"
        )
        stages.append(shown(browser, ".gone"))
        assert shown(browser, ".edge") == (2 if step else 0)
    # First everything is there, and from then on less and less.
    assert stages[0] == 0
    assert stages == sorted(stages)
    assert stages[-1] > stages[1] > 0
    assert "layer 3" in browser.run("document.querySelector('.step output').innerText")
    browser.run("document.querySelector('.step button').click()")
    assert browser.run("document.querySelector('.step input').value") == "0"
    wait_for(lambda: browser.run("document.querySelector('.step input').value") == str(layers), 30)
    assert_fits_a_phone(browser)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
