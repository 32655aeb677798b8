"""A limit on the time of a call into code that we did not write."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TookTooLong(Exception):
    """The limit is over."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises `TookTooLong` in the running code once the seconds are over. Main thread only.

    Code that is inside a C function then (a long product of matrices, say) ends that first.
    """
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread alone"

    def end(_: int, __: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
