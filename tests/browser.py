"""A page in a real headless Chromium, which is spoken to by its DevTools protocol over two pipes."""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
INSTALL = "apt-get install --yes --no-install-recommends chromium"
PATIENCE = 300.0
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-background-networking", "--no-first-run", "--remote-debugging-pipe"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find() -> str | None:
    """The browser of this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def opened(browser: str, profile: Path) -> Iterator["Tab"]:
    """An empty tab of a new browser."""
    (ours_in, theirs_out), (theirs_in, ours_out) = _pipe(), _pipe()
    hand_over = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["bash", "-c", hand_over, browser, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Tab(ours_in, ours_out)
        finally:
            process.kill()
            os.close(ours_in)
            os.close(ours_out)


def _pipe() -> tuple[int, int]:
    """To read from and to write to, with numbers above the two that the browser wants."""
    ends = os.pipe()
    found = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends]
    for end in ends:
        os.close(end)
    return found[0], found[1]


class Tab:
    """`told`: what the page printed, errors included, and what went wrong in loading it; `requests`: all URLs that it
    asked for."""

    def __init__(self, ours_in: int, ours_out: int) -> None:
        self._in, self._out, self._count, self._left = ours_in, ours_out, 0, b""
        self._session: dict[str, str] = {}
        self.told: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")
        self._session = {"sessionId": self.call("Target.attachToTarget", flatten=True, **target)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def visit(self, path: Path) -> None:
        """Returns when the page is loaded."""
        self._loaded = False
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._hear(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's when it is kept."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_until(self, expression: str) -> None:
        """Returns once a JavaScript expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.evaluate(f"new Promise((done) => requestAnimationFrame(() => done({expression})))"):
            assert time.monotonic() < until, expression

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def screenshot(self) -> np.ndarray:
        """The whole page: uint8 [H, W, 3]."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (heard := self._next()).get("id") != self._count:
            self._hear(heard)
        assert "error" not in heard, heard
        return heard["result"]

    def _hear(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Log.entryAdded":
            self.told.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.told.append(str([argument.get("value") for argument in given["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.told.append(json.dumps(given["exceptionDetails"]))

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], until - time.monotonic())
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
