"""Shared by all benchmarks: time and peak memory of a block of code, repetitions, ratios with their range, JSON."""

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
"""The folder of results: JSON and plots."""


@dataclass
class Usage:
    """What a block of code used."""

    seconds: float = 0.0
    peak_bytes: int = 0
    """The highest resident memory during the block, minus the resident memory at its start."""


@contextmanager
def usage() -> Iterator[Usage]:
    """Measures the block. Memory is the kernel's high-water mark, so temporary tensors count (Linux only)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, result, started = _status("VmRSS"), Usage(), time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - started
    result.peak_bytes = max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@dataclass(frozen=True)
class Ratio:
    """One value per repetition: of one arm, or the ratio of two arms within the repetition. Printed with its range."""

    values: list[float]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"


def back_to_back(arms: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[Any]]:
    """Runs all arms one after the other, in each repetition. A first repetition only warms up.

    Returns: by arm, what it returned in each repetition.
    """
    results: dict[str, list[Any]] = {name: [] for name in arms}
    for repetition in range(repetitions + 1):
        for name, run in arms.items():
            result = run()
            if repetition:
                results[name].append(result)
    return results


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that repeats its arms in this process. `doc`: the docstring of its module."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--threads", type=int, default=2)
    return made


def write_json(name: str, content: Any) -> Path:
    """Writes `runs/bench/NAME.json`; returns its path."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=1))
    return path
