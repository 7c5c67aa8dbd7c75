"""A real browser without a window, steered over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of Chromium.

    Args:
        folder: where it may keep its profile.
        size: width and height of the window.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 1000)) -> None:
        # Comes with gradio.
        from websockets.sync.client import connect

        if CHROMIUM is None:
            raise RuntimeError("there is no chromium here")
        words = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
        self._process = subprocess.Popen(
            [CHROMIUM, *words, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._number = 0
        self.messages: list[dict[str, Any]] = []
        try:
            port = wait_for(lambda: _port(folder), 60)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                page = next(found for found in json.load(answer) if found["type"] == "page")
            self._stack = ExitStack()
            self._socket = self._stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
        except BaseException:
            self._process.kill()
            raise
        for room in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{room}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; what the page reports meanwhile is kept."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.messages.append(message)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def open(self, address: str) -> None:
        """Load a page."""
        self.send("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState") == "complete", 60)

    def choose_files(self, selector: str, *files: Path) -> None:
        """Give files to an input element."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input element, as a user would."""
        self.run(f"(() => {{ const e = document.querySelector({selector!r}); e.focus(); e.select(); }})()")
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, *, kind: str = "png") -> None:
        """Save what the whole page looks like."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        options = {"quality": 80} if kind == "jpeg" else {}
        found = self.send("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def requests(self) -> list[str]:
        """Every address that the page has asked for; what it holds itself (``data:``) is left out."""
        asked = [one["params"] for one in self.messages if one.get("method") == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked if not one["request"]["url"].startswith("data:")]

    @property
    def errors(self) -> list[str]:
        """What went wrong in the page: scripts, refused resources."""
        found = [one["params"] for one in self.messages if one.get("method") == "Runtime.exceptionThrown"]
        logged = [one["params"]["entry"] for one in self.messages if one.get("method") == "Log.entryAdded"]
        return [str(one) for one in found] + [one["text"] for one in logged if one["level"] == "error"]

    def close(self) -> None:
        """End the browser."""
        self._stack.close()
        self._process.terminate()
        self._process.wait(30)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for(condition: Any, seconds: float) -> Any:
    """Ask again and again until there is an answer, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came of it within {seconds} s")
        time.sleep(0.1)
    return found


def _port(folder: Path) -> str:
    file = folder / "DevToolsActivePort"
    return file.read_text().split("\n")[0] if file.exists() else ""
