"""A headless Chromium, driven through a pipe in the DevTools protocol; nothing is installed for it.

The browser reads commands from its file descriptor 3 and answers on 4, each a JSON object that ends
with a zero byte.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0
"""Seconds to wait for an answer: the CPUs may be busy."""


def find_browser() -> str | None:
    """The program, or None where there is none that starts."""
    for program in filter(None, map(shutil.which, NAMES)):
        # Some distributions have a script of that name which only says what to install.
        done = subprocess.run([program, "--version"], capture_output=True, timeout=PATIENCE)
        if done.returncode == 0:
            return program
    return None


class Browser:
    """One page, and what it said and asked for."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int):
        self._process, self._write, self._read = process, write, read
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """All that the browser told without being asked."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, *, ready: str) -> None:
        """Open a file, and wait until an expression of the page is true."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        due = time.monotonic() + PATIENCE
        while not self.evaluate(f"Boolean({ready})"):
            assert time.monotonic() < due, f"{path}: not {ready}; {self.complaints}"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of the page, awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key, of what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def resize(self, width: int, height: int) -> None:
        """Of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def take_picture(self, path: Path) -> None:
        """Of the window, as PNG."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def requests(self) -> list[str]:
        """What was asked for, but for data in the page itself."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, and what was written to the console or the log."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], PATIENCE)[0], "the browser does not answer"
            data = os.read(self._read, 1 << 16)
            assert data, f"the browser ended with {self._process.wait()}"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def start_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start one with an empty profile, and end it."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()

    def take_places() -> None:
        # High numbers first: 3 or 4 may be one of those that are to be moved.
        high_in, high_out = os.dup2(to_browser, 100), os.dup2(from_browser, 101)
        os.dup2(high_in, 3)
        os.dup2(high_out, 4)

    command = [
        program,
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command, preexec_fn=take_places, close_fds=False, stderr=log, stdout=log
        )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(process, write, read)
    finally:
        os.close(write)  # the browser ends by itself
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read)
