"""What all measurements share: peak memory of a part of the process, repetitions, ratios with their spread, JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path("runs/bench")
"""JSON and plots."""


@dataclass
class Usage:
    """What a block of code took."""

    seconds: float = 0.0
    peak_bytes: int = 0
    """Highest resident memory, above what was resident at the block's start."""


@contextmanager
def usage() -> Iterator[Usage]:
    """Measures its block; memory by the kernel's high-water mark, so transient tensors count (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before, result, started = _status("VmRSS"), Usage(), time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - started
    result.peak_bytes = max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@dataclass(frozen=True)
class Ratio:
    """Of two arms that were run back to back several times; each repetition's ratio is taken within it."""

    values: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"


def back_to_back(arms: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[Any]]:
    """Runs all arms in turn, after one round that warms up; what each returned, by repetition."""
    results: dict[str, list[Any]] = {name: [] for name in arms}
    for repetition in range(repetitions + 1):
        for name, run in arms.items():
            result = run()
            if repetition:
                results[name].append(result)
    return results


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Command line of a measurement that repeats itself in this process; `doc`: its module's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--threads", type=int, default=2)
    return made


def write_json(name: str, content: Any) -> Path:
    """`runs/bench/NAME.json`."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=1))
    return path
