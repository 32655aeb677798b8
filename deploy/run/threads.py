"""A blocking call beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable


def in_daemon_thread(function: Callable[[], None]) -> asyncio.Future[None]:
    """Runs a blocking function in a thread that does not hold up the end of the process.

    `asyncio.to_thread` would: its threads are joined at the end, so a second Ctrl-C would wait for the whole call.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if not future.done():
            future.set_result(None) if error is None else future.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            function()
        except Exception as caught:  # handed over to whoever awaits the future
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, daemon=True).start()
    return future
