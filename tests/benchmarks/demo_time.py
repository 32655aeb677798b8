"""The demo's wall time by part of a round and its CPU seconds by role, until 97 % exact match and for the whole run.

    make bench        # or: python -m tests.benchmarks.demo_time [--rounds 80]
    python -m tests.benchmarks.demo_time --beside 2    # alone, then beside two busy processes, and the ratio

Runs `opdlm train deploy/demo.yaml` and watches its processes. The parts of a round come from the run's records. CPU
seconds are those that the kernel counts for each process; they are read twice a second, so the last half second of a
process may be missing. `runs/bench/demo/timeline.json` has every span of the run. The busy processes are those of
`stress-ng --cpu N` (Debian's package `stress-ng`); where it is not installed, as many endless loops.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from opdlm.deploy.observe.records import read_records
from tests.benchmarks.measure import OUT, write_json
from tests.system.victims import TITLES

RUN_FILE, RUN, TARGET = Path("deploy/demo.yaml"), OUT / "demo", 0.97
PARTS = ("rollout_busy_seconds", "teacher_busy_seconds", "train_seconds", "weight_push_seconds")


def watched(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command; returns the CPU seconds of its processes by role."""
    used: dict[tuple[int, float], tuple[str, float]] = {}
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for one in [process, *process.children(recursive=True)]:
                try:
                    times = one.cpu_times()
                    used[one.pid, one.create_time()] = _role(one, process.pid), times.user + times.system
                except psutil.Error:  # it has ended meanwhile
                    continue
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"bench: the run failed; see {log}")
    by_role: Counter[str] = Counter()
    for role, seconds in used.values():
        by_role[role] += seconds
    return dict(by_role)


def _role(process: psutil.Process, driver: int) -> str:
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    ours = (role for role, titles in TITLES.items() if title.startswith("ray::") and any(t in title for t in titles))
    return next(ours, "Ray itself")


def parts_of(records: list[dict[str, Any]], until: float) -> dict[str, float]:
    """Wall seconds of each part of the run. `until`: seconds of the run that count."""
    kept = [r for r in records if r["wall_seconds"] <= until]
    rounds = [r for r in kept if r["kind"] == "round"]
    first = next(r for r in records if r["kind"] == "publish")["wall_seconds"]
    parts = {"start, to the first weights": first}
    parts |= {name.removesuffix("_seconds"): sum(r[name] for r in rounds) for name in PARTS}
    parts["checkpoint"] = sum(r.get("checkpoint_seconds", 0.0) for r in kept if r["kind"] == "checkpoint")
    parts["evaluations, hand-overs, waiting"] = until - sum(parts.values())
    return parts


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keeps that many cores busy with other work while the block runs."""
    if not processes:
        yield
        return
    stress = shutil.which("stress-ng")
    one = [sys.executable, "-c", "while True: pass"]
    commands = [[stress, "--quiet", "--cpu", str(processes)]] if stress else [one] * processes
    started = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


def measure(rounds: int | None, beside: int) -> dict[str, Any]:
    """Runs the demo beside `beside` busy processes; prints where its time went.

    Returns: its seconds: `wall`, `cpu` by role, `parts` by name of the column, `reached` (to the target, or None).
    """
    shutil.rmtree(RUN, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opdlm", "train", str(RUN_FILE), "--set", f"run.dir={RUN}"]
    command += ["--set", f"run.rounds={rounds}"] if rounds else []
    started = time.perf_counter()
    with busy(beside):
        cpu = watched(command, OUT / "demo_time.log")
    wall, records = time.perf_counter() - started, read_records(RUN)
    curve = [r for r in records if r["kind"] == "evaluation" and r["row"] == "student"]
    reached = next((r["wall_seconds"] for r in curve if r["exact_match"] >= TARGET), None)
    last = records[-1]["wall_seconds"]
    where = f" beside {beside} busy processes" if beside else ""
    table = Table(title=f"{RUN_FILE}{where}: {wall:.0f} s wall, {sum(cpu.values()):.0f} s CPU")
    table.add_column("wall seconds")
    columns = {"whole run": parts_of(records, last)}
    if reached:
        columns = {f"to {TARGET:.0%}, dynamic": parts_of(records, reached), **columns}
    for name in columns:
        table.add_column(name, justify="right")
    for part in columns["whole run"]:
        table.add_row(part, *(f"{parts[part]:.1f}" for parts in columns.values()))
    table.add_row("sum", *(f"{s:.1f}" for s in ([reached] if reached else []) + [last]))
    roles = Table(title="CPU seconds, whole run")
    for role in cpu:
        roles.add_column(role, justify="right")
    roles.add_row(*(f"{seconds:.0f}" for seconds in cpu.values()))
    Console(width=130).print(table, roles)
    return {"wall": wall, "cpu": cpu, "parts": columns, "reached": reached}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds to train, if not as many as the run file has")
    parser.add_argument("--beside", type=int, default=0, help="measure again beside so many busy processes")
    chosen = parser.parse_args()
    console, content = Console(width=130), measure(chosen.rounds, 0)
    if chosen.beside:
        content["beside"] = measure(chosen.rounds, chosen.beside)
        times = content["beside"]["wall"] / content["wall"]
        console.print(f"beside {chosen.beside} busy processes: {times:.2f} times as long")
    console.print(f"written: {write_json('demo_time', content)}")


if __name__ == "__main__":
    main()
