"""Stopping a run: the first signal asks for an end with a checkpoint and says so at once, the second one ends at once.

Signals are SIGINT (Ctrl-C), SIGTERM (`kill`, `ray job stop`) and SIGHUP (the terminal is gone), which counts unless it
was ignored when the run began (`nohup`). Before the loops begin and after they have ended, the first one ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from opdlm.deploy.cluster.process_end import end_now, end_within

Result = TypeVar("Result")

_CLEAN_UP_SECONDS = 5.0
"""Longest time that files and actors are cleaned up for when a command ends at once."""
_ECHO_SECONDS = 1.0
"""`timeout`, `srun` and others send a signal to the process and to its group: what comes again so soon is the same."""
LEARNER_THREAD = "learner"
"""The thread that is in a call of Ray for as long as the learner runs."""
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stopped(KeyboardInterrupt):
    """A signal ends the command at once. `code`: the exit code, 128 + the signal, as shells have it."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{_NAMES[signal.Signals(number)]}: {what}")
        self.code = 128 + number


def end_a_hanging_learner(code: int) -> None:
    """`end_now` where the run has ended and its learner has not."""
    if any(thread.name == LEARNER_THREAD for thread in threading.enumerate()):
        end_now(code)


class EndAtOnce:
    """A block in which a signal raises `Stopped`. Files and actors are then cleaned up, quietly and for a short time.

    Python allows signal handlers in the main thread only; elsewhere the block changes none.
    """

    def __init__(self) -> None:
        self.what = "the run had not begun, so nothing is lost"
        """What the user reads."""
        self._before: dict[signal.Signals, Any] = {}
        self._excepthook = threading.excepthook
        self._timer: threading.Timer | None = None

    def __enter__(self) -> EndAtOnce:
        if threading.current_thread() is threading.main_thread():
            # None: the handler is not Python's, so it could not be put back.
            self._before = {n: handler for n in _signals() if (handler := signal.getsignal(n)) is not None}
        self.take()
        return self

    def take(self) -> None:
        """Takes the signals, again after asyncio or Ray took them."""
        for number in self._before:
            signal.signal(number, lambda number, _: self.now(number, self.what))

    def now(self, number: int, what: str) -> NoReturn:
        """Ends the block."""
        logging.disable(logging.CRITICAL)
        threading.excepthook = lambda _: None
        stopped = Stopped(number, what)
        self._timer = self._timer or end_within(_CLEAN_UP_SECONDS, stopped.code, f"opdlm: {stopped}\n")
        raise stopped

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()
            logging.disable(logging.NOTSET)
            threading.excepthook = self._excepthook
        if kind is SystemExit:  # Ray's own handler of SIGTERM, while Ray starts
            raise Stopped(signal.SIGTERM, self.what) from None


def _signals() -> list[signal.Signals]:
    return [n for n in _NAMES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopRequest:
    """Listens for signals. Make one inside the event loop of the run.

    Args:
        console: where the user reads that a signal came; with a live view, the line stays above it.
        end: ends the run at once.
    """

    def __init__(self, console: Console, end: EndAtOnce) -> None:
        self._console, self._end = console, end
        self._signal, self._since = 0, 0.0
        self._act: Callable[[], Any] = lambda: None
        self._what: Callable[[], str] = lambda: "the run ends, before its first round"
        self._tasks: list[asyncio.Future[Any]] = []
        self._loop = asyncio.get_running_loop()
        for number in _signals():
            self._loop.add_signal_handler(number, self._on_signal, number)

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

    def calls(self, stop: Callable[[], Awaitable[None]], what: Callable[[], str]) -> None:
        """From now on, a signal awaits `stop()`. Does so now where one has come already.

        Args:
            what: says what the run does then, as in `round 7 is finished, then a checkpoint is written`.
        """
        self._act = lambda: self._tasks.append(asyncio.ensure_future(stop()))
        self._what = what
        if self.asked:
            self._act()

    def _on_signal(self, number: int) -> None:
        if number == self._signal and time.monotonic() - self._since < _ECHO_SECONDS:
            return
        if self.asked:
            self._loop.set_exception_handler(lambda *_: None)
            self._end.now(number, "ended at once; --resume goes on from the last checkpoint")
        self._signal, self._since = int(number), time.monotonic()
        again = "a second one ends the run at once, and what is not in a checkpoint is lost"
        self._say(f"{_NAMES[signal.Signals(number)]}: {self._what()}; {again}")
        self._act()

    def _say(self, line: str) -> None:
        try:
            self._console.print(line, highlight=False, soft_wrap=True)
        except OSError:  # the terminal is gone
            self._console.file = open(os.devnull, "w")  # noqa: SIM115
