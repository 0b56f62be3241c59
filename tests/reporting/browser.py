"""Headless Chromium, driven over a pipe by the DevTools protocol: what a page asks for, logs, draws and looks like."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0
_COMPLAINTS = ("warning", "error", "assert")


def find_browser() -> str | None:
    """The browser of this machine; the environment's CHROMIUM goes first."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page.

    Attributes:
        requests: addresses that were asked for, in order.
        complaints: warnings and errors of the console, exceptions, and what the page's policy or the network refused.
        dialogs: windows that a script opened (alert and the like).
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._left = write, read, b""
        self._number, self._session = 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._read, 2**20)
            assert part, "the browser is gone"
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        answer = json.loads(text)
        self._note(answer.get("method", ""), answer.get("params", {}))
        return answer

    def _note(self, event: str, said: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and said["type"] in _COMPLAINTS:
            self.complaints.append(str(said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] in _COMPLAINTS:
            self.complaints.append(said["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(said["message"])

    def open(self, path: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> "Page":
        """Show a file in a window of a width, once all its pictures are drawn."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while self.value("document.documentElement?.dataset.ready") != "yes":
            assert time.monotonic() < end, f"never ready: {self.complaints}"
            time.sleep(0.05)
        return self

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        code, text = {"Tab": (9, {}), "Enter": (13, {"text": "\r"})}[key]
        for kind, more in (("keyDown", text), ("keyUp", {})):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """The window, or the whole page, as PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))


@contextlib.contextmanager
def browsing() -> Iterator[Page]:
    """A browser of its own with one page."""
    browser = find_browser()
    assert browser
    ours, theirs = os.pipe(), os.pipe()  # what it reads from us, what it writes
    with tempfile.TemporaryDirectory() as profile:
        # The protocol wants file descriptors 3 and 4.
        command = (
            f'exec "$0" --headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --remote-debugging-pipe '
            f'--user-data-dir="$1" 3<&{ours[0]} 4>&{theirs[1]}'
        )
        process = subprocess.Popen(
            ["bash", "-c", command, browser, profile], pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        try:
            yield Page(ours[1], theirs[0])
        finally:
            process.kill()
            process.wait()
            os.close(ours[1])
            os.close(theirs[0])
        shutil.rmtree(profile, ignore_errors=True)
