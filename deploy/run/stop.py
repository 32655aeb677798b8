"""Stopping a run: the first SIGINT or SIGTERM asks for an end with a checkpoint, the second one ends at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class StopRequest:
    """Listens for signals. Make one inside the event loop of the run."""

    def __init__(self) -> None:
        self._signal = 0
        self._act: Callable[[], Any] = lambda: None
        self._tasks: list[asyncio.Future[Any]] = []
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._signal > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it; 0 without one."""
        return 128 + self._signal if self._signal else 0

    async def cancels(self, preparing: Coroutine[Any, Any, Result]) -> Result | None:
        """Awaits a coroutine that a signal cancels; None where one did."""
        task = asyncio.ensure_future(preparing)
        self._act = task.cancel
        try:
            return await task
        except asyncio.CancelledError:
            return None

    def calls(self, stop: Callable[[], Awaitable[None]]) -> None:
        """From now on, a signal awaits `stop()`."""
        self._act = lambda: self._tasks.append(asyncio.ensure_future(stop()))

    def _on_signal(self, number: int) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self._signal = int(number)
        self._act()
