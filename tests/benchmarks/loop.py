"""The distributed run against the same computation in one process without Ray, on the same cores, with the demo.

    make bench        # or: python -m tests.benchmarks.loop [--rounds 12] [--repetitions 5]

Both arms run deploy/demo.yaml without evaluations: `opdlm train` with its actors, and `in_process.py` with two threads.
Each repetition runs both. The time of a round is the median over the rounds of a run, without the first two. The losses
of both are compared: they differ only by the order in which numbers are summed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opdlm.common.config import OpdlmConfig, load_config
from opdlm.deploy.observe.records import read_records
from tests.benchmarks.in_process import InProcess
from tests.benchmarks.measure import OUT, Ratio, write_json

RUN_FILE, WARM_UP = Path("deploy/demo.yaml"), 2


def settings(rounds: int) -> list[str]:
    """The overrides of the run file, for both arms."""
    return [
        f"run.rounds={rounds}",
        f"run.dir={OUT}/loop",
        "evaluation.every_rounds=null",
        "evaluation.final_problems=0",
    ]


def distributed(rounds: int) -> dict[str, Any]:
    """Runs `opdlm train` in a process of its own; returns its losses and median seconds."""
    shutil.rmtree(OUT / "loop", ignore_errors=True)
    command = [sys.executable, "-m", "opdlm", "train", str(RUN_FILE)]
    command += [part for setting in settings(rounds) for part in ("--set", setting)]
    log = OUT / "loop.log"
    with log.open("w") as out:
        if subprocess.run(command, stdout=out, stderr=out).returncode:
            sys.exit(f"bench: the run failed; see {log}")
    records = read_records(OUT / "loop")
    found = [r for r in records if r["kind"] == "round"][WARM_UP:]
    parts = {
        "rollout": [r["rollout_busy_seconds"] for r in found],
        "teacher": [r["teacher_busy_seconds"] for r in found],
        "train": [r["train_seconds"] for r in found],
        "push": [r["weight_push_seconds"] for r in found],
        "round": [r["round_seconds"] for r in found],
    }
    return {"losses": [r["loss"] for r in records if r["kind"] == "step"], **_medians(parts)}


def in_process(rounds: int, config: OpdlmConfig) -> dict[str, Any]:
    """Runs the same in this process; returns its losses and median seconds."""
    shutil.rmtree(OUT / "in_process", ignore_errors=True)
    run = InProcess(config, OUT / "in_process")
    done = list(run.rounds())
    kept = done[WARM_UP:]
    parts = {
        "rollout": [r.rollout_seconds for r in kept],
        "teacher": [r.teacher_seconds for r in kept],
        "train": [r.train_seconds for r in kept],
        "push": [0.0],
        "round": [r.seconds for r in kept],
    }
    return {"losses": [loss for r in done for loss in r.losses], **_medians(parts)}


def _medians(parts: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in parts.items()}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    OUT.mkdir(parents=True, exist_ok=True)
    config = load_config(RUN_FILE, settings(chosen.rounds))
    arms: dict[str, list[dict[str, Any]]] = {"one process": [], "distributed": []}
    for _ in range(chosen.repetitions):
        arms["one process"].append(in_process(chosen.rounds, config))
        arms["distributed"].append(distributed(chosen.rounds))
    pairs = list(zip(arms["distributed"], arms["one process"], strict=True))
    ratio = Ratio([d["round"] / o["round"] for d, o in pairs])
    apart = max(abs(a / b - 1) for d, o in pairs for a, b in zip(d["losses"], o["losses"], strict=True))
    table = Table(
        title=f"seconds of a round of {RUN_FILE}, medians of {chosen.repetitions} runs of {chosen.rounds} rounds"
    )
    table.add_column("arm")
    for name in ("rollout", "teacher", "train", "push", "round", "times one process"):
        table.add_column(name, justify="right")
    for name, runs in arms.items():
        cells = [
            f"{median(run[part] for run in runs):.3f}" for part in ("rollout", "teacher", "train", "push", "round")
        ]
        table.add_row(name, *cells, str(ratio) if name == "distributed" else "1")
    console = Console(width=130)
    console.print(table, f"largest relative difference of a step's loss between the two: {apart:.1e}")
    console.print(f"written: {write_json('loop', {'arms': arms, 'times': ratio.values})}")


if __name__ == "__main__":
    main()
