"""How this process ends where Ray's C++ code or a thread waits, which no exception and no signal of Python interrupts.

A Ray cluster that the process started ends with it: its children are killed. A cluster elsewhere ends what the driver
asked of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import psutil

_FLUSH_SECONDS = 5.0
_WRITE_SECONDS = 1.0


def end_now(code: int) -> NoReturn:
    """Ends the process without what Python and Ray do at exit.

    While a thread is in a call of Ray, as the learner's is when a run ends at once, Ray's own end may wait for it,
    write about it and exit with 1.
    """
    end_within(_FLUSH_SECONDS, code)  # a pipe that is full and that nobody reads blocks the flush
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    _kill_children()
    os._exit(code)


def end_within(seconds: float, code: int, line: str = "") -> threading.Timer:
    """Ends the process with this code unless it has ended by then or the timer is cancelled.

    Args:
        line: what the user still has to read then.
    """

    def end() -> None:
        _kill_children()
        if timer.finished.is_set():  # it was cancelled meanwhile: the process ends by itself, with a line of its own
            return
        writer = threading.Thread(target=_write, args=(line,), daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)  # a pipe that is full and that nobody reads blocks it
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def ends_process_after(seconds: float, failure: str) -> Iterator[None]:
    """Ends the process with exit code 2 and the line `failure` if the block takes longer."""
    timer = end_within(seconds, 2, f"opdlm: {failure}\n")
    try:
        yield
    finally:
        timer.cancel()


def _write(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal or the reader is gone
        os.write(2, line.encode())


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            child.kill()
