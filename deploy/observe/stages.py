"""Lines that say what a run does while there is nothing else to see: with the seconds since it began."""

from __future__ import annotations

import time

from rich.console import Console


class Stages:
    """Call it with what begins now, as in `starting Ray`."""

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, time.monotonic()

    def __call__(self, what: str) -> None:
        line = f"{time.monotonic() - self._begun:4.0f} s  {what}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
