"""Whole runs of seconds for tests: their config, a run in a process of its own, its losses."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.deploy.observe.records import read_records
from tests import REPOSITORY

ROUNDS = 6


def run_config(teacher: Path, run_dir: Path, /, **sections) -> OpdlmConfig:
    """A run of seconds: a random teacher of a few thousand parameters."""
    base = {
        "run": {"dir": str(run_dir), "rounds": ROUNDS, "deterministic": True},
        "model": {"teacher": str(teacher), "dtype": "float32"},
        "data": {"task": "chain", "prompts": 20},
        "rollout": {"prompts_per_round": 8, "batch_size": 4, "max_new_tokens": 9},
        "teacher": {"dtype": "float32"},
        "learner": {"workers": 2, "batch_size": 4, "micro_batch_rows": 2, "optimizer": {"lr": 1e-3}},
        "objective": {"exclude_eos": False},
        "checkpoint": {"every_rounds": 1, "keep": 20},
        "evaluation": {"final_problems": 5, "max_new_tokens": 9},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return config_from_dict(base)


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by optimizer step; a step that was run twice must have given the same."""
    found: dict[int, tuple[float, float]] = {}
    for record in read_records(run_dir):
        if record["kind"] == "step":
            assert record["step"] not in found, f"step {record['step']} is in the metrics twice"
            found[record["step"]] = (record["loss"], record["grad_norm"])
    return found


def start(config: OpdlmConfig, resume: bool) -> subprocess.Popen:
    """`opdlm train` in a process of its own."""
    file = Path(config.run.dir).with_suffix(".yaml")
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "opdlm", "train", str(file)] + (["--resume"] if resume else [])
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def run_until(config: OpdlmConfig, resume: bool, rounds: int, send: signal.Signals) -> int:
    """Starts a run, sends a signal once so many rounds have a checkpoint, returns the exit code."""
    process = start(config, resume)
    try:
        wait_for_rounds(Path(config.run.dir), rounds, process)
        process.send_signal(send)
        return process.wait(timeout=300)
    finally:
        process.kill()
        process.wait()


def wait_for_rounds(run_dir: Path, rounds: int, process: subprocess.Popen) -> None:
    """Waits until that many rounds were trained and, where checkpoints are each round, saved."""
    limit = time.monotonic() + 400
    while time.monotonic() < limit:
        assert process.poll() is None, f"the run ended with {process.returncode} before round {rounds}"
        done = read_records(run_dir)
        if any(r["kind"] == "checkpoint" and r["round"] >= rounds - 1 for r in done) and any(
            r["kind"] == "round" and r["round"] >= rounds for r in done
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"no round {rounds} in 400 s")
