"""A headless Chromium, asked by the DevTools protocol over two pipes: what a page loads, says and looks like.

The protocol is at https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync"),
)
_PATIENCE = 60.0  # seconds for one answer

Listener: TypeAlias = Callable[[dict[str, Any]], None]


def find_chromium() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """One page in the browser.

    Attributes:
        requested: The addresses that it has asked for, ``data:`` ones left out.
        said: Messages of the console, warnings and errors of the browser, and exceptions.
    """

    _browser: "Browser"
    _session: str
    requested: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    _is_loaded: bool = False

    def open(self, address: str, width: int, height: int = 900, dark: bool = False, print_: bool = False) -> None:
        """Load an address in a window of this size and colour scheme, and wait until all of it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.requested.clear()
        self.said.clear()
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setEmulatedMedia", media="print" if print_ else "screen", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self._is_loaded = False
        self.ask("Page.navigate", url=address)
        while not self._is_loaded:
            self._browser.hear(self._session, self._listen)
        self.value("Promise.allSettled([...document.images].map(image => image.decode())).then(() => 0)")

    def value(self, script: str) -> Any:
        """What a script gives in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what the window shows, or all of the page, as PNG."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(found["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self, path: Path) -> None:
        """Print the page."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"]))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; see there."""
        return self._browser.ask(method, self._session, self._listen, **parameters)

    def _listen(self, event: dict[str, Any]) -> None:
        told = event["params"]
        match event["method"]:
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Network.requestWillBeSent":
                address = told["request"]["url"]
                if not address.startswith("data:"):
                    self.requested.append(address)
            case "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(of.get("value", of.get("description"))) for of in told["args"]))
            case "Runtime.exceptionThrown":
                self.said.append(str(told["exceptionDetails"]))
            case "Log.entryAdded":
                self.said.append(told["entry"]["text"])


class Browser:
    """A running browser; `browser` starts and ends one."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._count, self._buffer = 0, b""

    def tab(self) -> Tab:
        """Open an empty page."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        return Tab(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def ask(self, method: str, session: str = "", listen: Listener | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result; what the page tells meanwhile goes to a listener."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters}
        os.write(
            self._commands, json.dumps({**command, **({"sessionId": session} if session else {})}).encode() + b"\0"
        )
        while (answer := self.hear(session, listen)).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def hear(self, session: str, listen: Listener | None) -> dict[str, Any]:
        """Wait for the next message; an event of the page goes to the listener."""
        message = self._next()
        if listen is not None and "method" in message and message.get("sessionId") == session:
            listen(message)
        return message

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            read = os.read(self._answers, 2**16) if ready else b""
            if not read:
                raise RuntimeError("Chromium does not answer")
            self._buffer += read
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


def _pipe() -> tuple[int, int]:
    """The ends of a pipe, under numbers above those that the browser is to find its own under."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Run a headless browser with an empty profile."""
    to_browser, from_us = _pipe()
    from_browser, to_us = _pipe()
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [*_OPTIONS, *root, f"--user-data-dir={profile}"]
        # the browser reads commands from descriptor 3 and answers on 4
        script = f'exec "$@" 3<&{to_browser} 4>&{to_us}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *options],
            pass_fds=(to_browser, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(to_us)
        running = Browser(from_us, from_browser)
        try:
            yield running
        finally:
            with suppress(RuntimeError, OSError):
                running.ask("Browser.close")
            process.wait(_PATIENCE)
            os.close(from_us)
            os.close(from_browser)
