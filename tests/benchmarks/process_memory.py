"""What Python, torch and Ray take in each process of a run. `python -m tests.benchmarks.process_memory`

Starts a run with a model of a few thousand parameters and prints the largest resident and proportional (PSS) memory of
its processes by kind. `deploy/cluster/memory.py` counts the resident figures: a plan has to hold where no library pages
are shared, as for the first process on a node.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil

from tests.system.runs import run_config, start
from tests.tiny import save_teacher

_EVERY_SECONDS = 0.5


def main() -> None:
    """Runs and prints a line for each kind of process."""
    most: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    with tempfile.TemporaryDirectory() as folder:
        process = start(run_config(save_teacher(Path(folder) / "t"), Path(folder) / "run"), resume=False)
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for found in [driver, *driver.children(recursive=True)]:
                    _note(most, found, "driver" if found == driver else "")
            with contextlib.suppress(Exception):
                process.wait(_EVERY_SECONDS)
    for name, (rss, pss, uss) in sorted(most.items()):
        print(f"{name:40} resident {rss / 2**20:6.0f} MiB  proportional {pss / 2**20:6.0f}  own {uss / 2**20:6.0f}")


def _note(most: dict[str, list[float]], process: psutil.Process, name: str) -> None:
    with contextlib.suppress(psutil.Error):
        name = name or process.cmdline()[0].split(".")[0].split("/")[-1]
        memory = process.memory_full_info()
        most[name] = [max(old, new) for old, new in zip(most[name], (memory.rss, memory.pss, memory.uss), strict=True)]


if __name__ == "__main__":
    main()
