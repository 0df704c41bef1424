"""A headless Chromium, driven with the DevTools protocol: what a page looks like, and what it complains of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--remote-debugging-pipe"),
)

# What sticks out of the page to the right and lies in no box that scrolls by itself.
OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (element) => element && (
    /auto|scroll|hidden/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
  const out = [...document.querySelectorAll("body *")].filter(
    (element) => element.getBoundingClientRect().right > width + 1 && !scrolls(element.parentElement));
  const names = out.map((element) => element.tagName + "." + (element.className.baseVal ?? element.className));
  return document.documentElement.scrollWidth > width ? ["the page", ...names] : names;
})()
"""


def chromium() -> str | None:
    """Where it is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Seen:
    """A page as it was shown.

    Attributes:
        overflow: What sticks out of it.
        complaints: What came to the console, and exceptions.
        requests: What was asked for over the network.
        height: Of all of it, pixels.
        png: A picture of all of it.
    """

    overflow: list[str]
    complaints: list[str]
    requests: list[str]
    height: int
    png: bytes


class Browser:
    """A browser with one page; made by :func:`browser`."""

    def __init__(self, program: str, profile: str) -> None:
        ours_to_read, write = os.pipe()  # the protocol's pipes are number 3, to the browser, and number 4, from it
        read, theirs_to_write = os.pipe()
        wired = f'exec "$@" 3<&{ours_to_read} 4>&{theirs_to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", wired, "bash", program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(ours_to_read, theirs_to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours_to_read)
        os.close(theirs_to_write)
        self._to, self._from = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self._number, self._events, self._session = 0, [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End it."""
        self._to.close()
        self._from.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._received()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def see(self, page: Path, *, width: int, dark: bool = False) -> Seen:
        """Open a page in a window of that many pixels.

        Args:
            page: An HTML file.
            width: Of the window; a phone below 500.
            dark: Whether the reader prefers dark pages.
        """
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._resize(width, 900)
        self._events.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._received()
        overflow = self.value(OVERFLOW)
        height = self.value("document.documentElement.scrollHeight")
        self._resize(width, height)
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        complaints = [json.dumps(event["params"]) for event in self._events if event["method"] in kinds]
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["request"]["url"] for event in sent]
        return Seen(overflow, complaints, [url for url in urls if not url.startswith(("file:", "data:"))], height, png)

    def _resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def value(self, expression: str) -> Any:
        """What a line of JavaScript gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _received(self) -> dict[str, Any]:
        """The next message; events are kept."""
        parts = []
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            parts.append(byte)
        message = json.loads(b"".join(parts))
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser, and end it."""
    program = chromium()
    if program is None:
        raise RuntimeError(f"none of {', '.join(PROGRAMS)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = Browser(program, profile)
        try:
            yield started
        finally:
            started.close()
