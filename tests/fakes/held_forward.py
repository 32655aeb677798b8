"""Holds a model in one of its forwards, so that a test knows where a thread that decodes is."""

from __future__ import annotations

import threading
from typing import Any

from tests.patience import PATIENCE


def held_in(model: Any, forward: int) -> tuple[threading.Event, threading.Event]:
    """Holds `model` in a forward, counted from 1: the first event is set when it is there, the second lets it go on."""
    there, go, forwards = threading.Event(), threading.Event(), []

    def hold(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == forward:
            there.set()
            assert go.wait(timeout=PATIENCE)

    model.lm_head.register_forward_pre_hook(hold)
    return there, go
