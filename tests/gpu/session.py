"""Runs the tests and measurements for a GPU within a time, the most telling first; a table of all parts at the end.

    python -m tests.gpu.session [--only tests|bench] [--minutes 9.5] [--out runs/gpu] [--parts flex decoding]
    python -m tests.gpu.session --device cpu --minutes 3      # tries the session itself, without a GPU

Each part is a process with a time limit of its own; one that exceeds it is ended with all its children, and the next
one begins. OUT gets `log.txt` (of each part the end, at most 1 MiB), `figures.jsonl` (every measurement, written as it
comes) and `summary.json`, together far below 16 MiB. The exit code is 1 if a part failed or was not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from tests import REPOSITORY

_KEPT_BYTES = 1 << 20
_SHOWN_LINES = 12


@dataclass(frozen=True)
class Part:
    """One process of a session."""

    name: str
    kind: str
    """`tests` or `bench`."""
    seconds: int
    """Its longest time."""
    arguments: tuple[str, ...]
    """Of `python -m`."""

    def command(self, device: str, figures: Path) -> list[str]:
        """The whole command."""
        command = [sys.executable, "-m", *self.arguments]
        if self.kind == "bench":
            tiny = ["--tiny", "--repetitions", "1"] if device == "cpu" else []
            command += ["--device", device, "--journal", str(figures), *tiny]
        return command


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    seconds: float
    how: str
    """`ok`, `failed (CODE)`, `cut off` or `not run`."""
    last_line: str


def _tests(name: str, seconds: int, *files: str) -> Part:
    paths = [f"tests/gpu/test_{file}.py" for file in files]
    return Part(
        name, "tests", seconds, ("pytest", "-q", "--durations=5", "--show-capture=stderr", "--tb=short", *paths)
    )


def _bench(name: str, seconds: int, module: str, *arguments: str) -> Part:
    return Part(name, "bench", seconds, (f"tests.benchmarks.gpu.{module}", *arguments))


PARTS = (
    _tests("decoding", 120, "decoding"),
    _tests("flex", 180, "flex"),
    _bench("decode 0.6B, batch 1, 8", 100, "decoding", "--shapes", "0.6B", "--batches", "1", "8"),
    _bench("train 0.6B", 150, "training"),
    _tests("golden and parity", 90, "golden", "parity"),
    _tests("ranks", 120, "ranks"),
    _bench("decode 8B, batch 1, 8", 90, "decoding", "--shapes", "8B", "--batches", "1", "8"),
    _tests("loop", 240, "loop"),
    _bench("score 0.6B", 40, "scoring"),
    _bench("push 1.2 GB", 90, "pushing"),
    _bench("decode 0.6B, batch 64, 256", 90, "decoding", "--shapes", "0.6B", "--batches", "64", "256"),
    _bench("decode 8B, batch 64, 256", 100, "decoding", "--shapes", "8B", "--batches", "64", "256"),
)


def run(part: Part, limit: float, device: str, out: Path, log: IO[bytes]) -> Outcome:
    """Runs one part to its end or its limit; its output goes to the log, and the end of it to the terminal."""
    environment = os.environ | {"OPDLM_TEST_DEVICE": device, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            part.command(device, out / "figures.jsonl"),
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout=limit)
            how = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            how = "cut off"
            _end(process.pid)
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - _KEPT_BYTES, 0))
        text = output.read()
    seconds = time.monotonic() - started
    log.write(f"\n===== {part.name}: {how}, {seconds:.0f} s\n".encode() + text)
    log.flush()
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    print(f"\n===== {part.name}: {how}, {seconds:.0f} s", *lines[-_SHOWN_LINES:], sep="\n", flush=True)
    return Outcome(part.name, round(seconds, 1), how, lines[-1][:200] if lines else "")


def _end(pid: int) -> None:
    """Kills a process and everything below it, Ray's processes too."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def figures_of(file: Path) -> list[dict[str, Any]]:
    """The measurements so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> int:
    """Runs the parts in their order while there is time."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=["tests", "bench"])
    options.add_argument("--parts", nargs="+", help="words that the names of parts contain")
    options.add_argument("--minutes", type=float, default=9.5)
    options.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    options.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    chosen = options.parse_args()
    end, out = time.monotonic() + 60 * chosen.minutes, chosen.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.jsonl").unlink(missing_ok=True)
    wanted = [part for part in PARTS if chosen.only in (None, part.kind)]
    if chosen.parts:
        wanted = [part for part in wanted if any(word in part.name for word in chosen.parts)]
    outcomes = []
    with (out / "log.txt").open("wb") as log:
        for part in wanted:
            left = end - time.monotonic()
            if left < 10:
                outcomes.append(Outcome(part.name, 0.0, "not run", "no time was left"))
                continue
            outcomes.append(run(part, min(part.seconds, left), chosen.device, out, log))
            summary = {"parts": [asdict(each) for each in outcomes], "figures": figures_of(out / "figures.jsonl")}
            (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\n{'part':<28}{'outcome':<14}{'seconds':>8}  last line")
    for each in outcomes:
        print(f"{each.name:<28}{each.how:<14}{each.seconds:>8.0f}  {each.last_line[:100]}")
    print(f"written: {out}/log.txt, figures.jsonl, summary.json")
    return int(any(each.how != "ok" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
