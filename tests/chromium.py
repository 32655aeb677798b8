"""A headless Chromium, controlled through its DevTools pipe: opens a page, presses keys, evaluates JavaScript."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

BINARY = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_KEY_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32}


class Chromium:
    """One browser with one page, as a context manager.

    Args:
        profile: empty folder for the browser's files.
        dark: whether the reader prefers a dark colour scheme.
    """

    def __init__(self, profile: Path, dark: bool = False, size: tuple[int, int] = (1280, 1100)) -> None:
        assert BINARY is not None
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands_in} 4>&{answers_out}', "bash", BINARY),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"),
                "about:blank",
            ],
            pass_fds=(commands_in, answers_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_in)
        os.close(answers_out)
        self._buffer, self._last = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a DevTools command and returns its result; events that arrive before it are added to `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Loads a file or an address and waits until its scripts have run."""
        self.events.clear()
        self.call(
            "Page.navigate", url=(page.resolve().as_uri() if isinstance(page, Path) else page) + fragment
        )  # answers when loading has started
        self.ask("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def ask(self, expression: str) -> Any:
        """Evaluates a JavaScript expression in the page and returns its value; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Presses and releases a key."""
        code = {"key": key, "windowsVirtualKeyCode": _KEY_CODES[key], "modifiers": 8 if shift else 0}
        if key == " ":
            code["text"] = key
        self.call("Input.dispatchKeyEvent", type="keyDown", **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str) -> None:
        """Clicks with the left mouse button in the middle of an element."""
        place = self.ask(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def picture(self, file: Path, whole_page: bool = False) -> None:
        """Saves the visible part, or the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)["data"]
        file.write_bytes(base64.b64decode(data))

    def problems(self, *origins: str, but: str | None = None) -> list[dict[str, Any]]:
        """Exceptions, messages but those of the source `but`, and requests for anything but `origins`."""
        bad = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        bad += [entry for entry in entries if entry["source"] != but]
        requests = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return bad + [{"url": url} for url in requests if not url.startswith(origins)]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._answers, 1 << 16)
            assert piece, "the browser ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
