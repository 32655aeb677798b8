"""The demo's wall time by part of a round and its CPU seconds by role, until 97 % exact match and for the whole run.

    make bench        # or: python -m tests.benchmarks.demo_time [--rounds 80]

Runs `opdlm train deploy/demo.yaml` and watches its processes. The parts of a round come from the run's records. CPU
seconds are those that the kernel counts for each process; they are read twice a second, so the last half second of a
process may be missing. `runs/bench/demo/timeline.json` has every span of the run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
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


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds to train, if not as many as the run file has")
    chosen = parser.parse_args()
    shutil.rmtree(RUN, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opdlm", "train", str(RUN_FILE), "--set", f"run.dir={RUN}"]
    command += ["--set", f"run.rounds={chosen.rounds}"] if chosen.rounds else []
    started = time.perf_counter()
    cpu = watched(command, OUT / "demo_time.log")
    wall, records = time.perf_counter() - started, read_records(RUN)
    curve = [r for r in records if r["kind"] == "evaluation" and r["row"] == "student"]
    reached = next((r["wall_seconds"] for r in curve if r["exact_match"] >= TARGET), None)
    last = records[-1]["wall_seconds"]
    table = Table(title=f"{RUN_FILE}: {wall:.0f} s wall, {sum(cpu.values()):.0f} s CPU")
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
    content = {"wall": wall, "cpu": cpu, "parts": columns, "reached": reached}
    Console(width=130).print(f"written: {write_json('demo_time', content)}")


if __name__ == "__main__":
    main()
