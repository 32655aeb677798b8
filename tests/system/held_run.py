"""`opdlm` with a driver that waits after a round: `python -m tests.system.held_run FILE ROUNDS train run.yaml`.

A run of a tiny model trains its rounds in less time than a busy machine may take to wake the test that watches it. Here
the driver stops when `wait_for_rounds` has what it waits for (`ROUNDS` trained rounds, a checkpoint of all but at most
the last of them), and goes on when `FILE` exists. Rollouts are asked for by the driver, so the run waits with it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from opdlm.deploy.cli import app
from opdlm.deploy.observe.terminal import PlainView


def hold(file: Path, rounds: int) -> None:
    """Has plain views wait for `file`."""
    show, newest = PlainView.show, {"round": 0, "checkpoint": -1}

    def held(self: PlainView, record: dict[str, Any]) -> None:
        show(self, record)
        if record["kind"] in newest:
            newest[record["kind"]] = record["round"]
        while newest["round"] >= rounds and newest["checkpoint"] >= rounds - 1 and not file.exists():
            time.sleep(0.05)

    PlainView.show = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold(Path(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    app()
