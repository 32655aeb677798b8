"""A limit on the time of a call into code that we did not write."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 1.0
"""Time after which code that went on after the limit is interrupted again."""


class TookTooLong(BaseException):
    """The limit is over. No `Exception`, so that `except Exception` in the code that took too long lets it pass."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises `TookTooLong` in the running code once the seconds are over. Main thread only.

    Code that is inside a C function then (a long product of matrices, say) ends that first.
    """
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread alone"

    def end(_: int, __: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
