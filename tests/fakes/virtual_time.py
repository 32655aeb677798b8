"""An event loop whose clock costs nothing: where nothing is ready, it is the time of the next timer.

What sleeps for an hour takes microseconds, and every duration that a test measures is exact, whatever else the machine
does. For coroutines only: a thread, a socket or a subprocess lives in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Waits by moving the clock. The loop says how long it would wait: until its next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError(
                f"everything waits for everything at {self.now:g} s: nothing is ready, no timer is set"
            )
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`asyncio` with virtual seconds."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
