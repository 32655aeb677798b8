"""How long a test waits for what is sure to come.

No test may depend on how fast the machine is, so each wait has the same limit, which only ends a test that hangs: a
little less than pytest's own, so that the test says what it waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 1500.0
"""Seconds; pyproject.toml gives a test 1,800."""

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], what: str, pause: float = 0.1) -> Found:
    """Asks every `pause` seconds until `condition()` is true; returns its value. `what`: what is waited for."""
    limit = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < limit, f"waited {PATIENCE:g} s for {what}"
        time.sleep(pause)
    return found
