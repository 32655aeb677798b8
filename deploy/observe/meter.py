"""How far a command is that answers many prompts: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opdlm.deploy.observe.terminal import rate_text

PLAIN_SECONDS = 10.0


class Meter:
    """A context manager. `begin` names what is done next, and a call says how much of it is done.

    Args:
        clock: seconds that only grow.
        done: what is done with the parts, for the plain lines.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, done: str = "answered") -> None:
        self._console, self._clock, self._done = console, clock, done
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._row = self._bar.add_task("", total=None)
        self._name, self._total = "", 0
        self._begun = self._last = clock()

    def __enter__(self) -> Meter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def begin(self, name: str, total: int) -> None:
        """Begins something of `total` parts."""
        self._name, self._total = name, total
        self._begun = self._last = self._clock()
        self._bar.reset(self._row, description=name, total=total)

    def __call__(self, done: int) -> None:
        """`done` parts are done."""
        self._bar.update(self._row, completed=done)
        now = self._clock()
        if not self._console.is_terminal and now - self._last >= PLAIN_SECONDS:
            self._last = now
            rate = f" ({rate_text(done / (now - self._begun))}/s)" if done else ""
            line = f"{self._name}: {done:,} of {self._total:,} {self._done}{rate}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
