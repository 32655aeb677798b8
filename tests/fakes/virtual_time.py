"""An event loop with a virtual clock: where no coroutine is ready, the clock jumps to the next timer.

A sleep of an hour takes microseconds, and every duration that a test measures is exact, however busy the machine is.
This works for coroutines only: threads, sockets and subprocesses run in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Moves the clock instead of waiting. The event loop passes the time until its next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError(f"deadlock at {self.now:g} s: no coroutine is ready, and no timer is set")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop with virtual seconds."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._clock.now


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Like `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
