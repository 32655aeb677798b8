"""Whole runs of a few seconds for tests: their config, a run in a process of its own, what its records say."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.train import train
from tests import REPOSITORY
from tests.patience import PATIENCE, wait_until

ROUNDS, PROMPTS_PER_ROUND = 6, 8


def run_config(teacher: Path, run_dir: Path, /, **sections) -> OpdlmConfig:
    """The config of a run of a few seconds: ROUNDS rounds, a teacher of a few thousand parameters.

    Args:
        teacher: its folder; the student is converted from it.
        sections: settings by section, in addition to the defaults here or instead of them.
    """
    base = {
        "run": {"dir": str(run_dir), "rounds": ROUNDS, "deterministic": True},
        "model": {"teacher": str(teacher), "dtype": "float32"},
        "data": {"task": "chain", "prompts": 20},
        "rollout": {"prompts_per_round": PROMPTS_PER_ROUND, "batch_size": 4, "max_new_tokens": 9},
        "teacher": {"dtype": "float32"},
        "learner": {"workers": 2, "batch_size": 4, "micro_batch_tokens": 40, "optimizer": {"lr": 1e-3}},
        "objective": {"exclude_eos": False},
        "checkpoint": {"every_rounds": 1, "keep": 20},
        "evaluation": {"final_problems": 5, "max_new_tokens": 9},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return config_from_dict(base)


# --- a run in a process of its own ------------------------------------------------------------------------------------


def start(config: OpdlmConfig, resume: bool, held_after: int | None = None) -> subprocess.Popen:
    """Starts `opdlm train`.

    Args:
        held_after: rounds after which its driver waits until `let_go` is called (`tests/system/held_run.py`).
    """
    run_dir = Path(config.run.dir)
    file = run_dir.with_suffix(".yaml")
    file.write_text(dump_config(config))
    _go(run_dir).unlink(missing_ok=True)
    program = ["opdlm"] if held_after is None else ["tests.system.held_run", str(_go(run_dir)), str(held_after)]
    command = [sys.executable, "-m", *program, "train", str(file)] + (["--resume"] if resume else [])
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def let_go(run_dir: Path) -> None:
    """Lets a driver that is held go on."""
    _go(run_dir).touch()


def _go(run_dir: Path) -> Path:
    return run_dir.with_suffix(".go")


def run_to_end(file: Path, *more: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `opdlm train` on a run file to its end. `more`: further arguments."""
    command = [sys.executable, "-m", "opdlm", "train", str(file), *more]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@contextlib.contextmanager
def running(config: OpdlmConfig, held_after: int | None = None) -> Iterator[subprocess.Popen]:
    """Starts `opdlm train` (`start`); kills it at the end of the block if it still runs."""
    process = start(config, resume=False, held_after=held_after)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train_here(config: OpdlmConfig, resume: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Runs a job in this process to a good end. A process of its own would import everything again.

    Args:
        meanwhile: what happens beside it, in a thread, such as deaths of actors; its exceptions are raised here.
    """
    happened: Future[object] = Future()

    def happen() -> None:
        try:
            happened.set_result(meanwhile())
        except BaseException as problem:
            happened.set_exception(problem)

    threading.Thread(target=happen, daemon=True).start()
    assert train(config, resume=resume, console=Console(quiet=True)) == 0
    happened.result(timeout=60)  # a run that ends before it has happened shows nothing


def run_until(config: OpdlmConfig, resume: bool, rounds: int, send: signal.Signals) -> int:
    """Starts a run, sends it a signal when `rounds` rounds are trained, and returns its exit code."""
    process, run_dir = start(config, resume, held_after=rounds), Path(config.run.dir)
    try:
        wait_for_rounds(run_dir, rounds, process)
        process.send_signal(send)
        let_go(run_dir)
        return process.wait(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()


def wait_for_rounds(run_dir: Path, rounds: int, process: subprocess.Popen | None = None) -> None:
    """Waits until `rounds` rounds are trained and a checkpoint of at least `rounds - 1` rounds is saved.

    `process`: of the run, where it has one.
    """

    def there() -> bool:
        assert process is None or process.poll() is None, f"the run ended with {process.returncode} before {rounds}"
        records = read_records(run_dir)
        return any(r["kind"] == "checkpoint" and r["round"] >= rounds - 1 for r in records) and any(
            r["kind"] == "round" and r["round"] >= rounds for r in records
        )

    wait_until(there, f"round {rounds}", pause=0.05)


def wait_until_still(run_dir: Path, seconds: float = 5.0) -> None:
    """Waits until the run has recorded nothing for a while, because everything in it waits for a stopped process.

    On a machine so busy that nothing is recorded for that long anyway, the process is not in a call yet when the wait
    ends; what a test then sees of its death is the same.
    """
    records, still_since = -1, time.monotonic()
    while time.monotonic() - still_since < seconds:
        if len(found := read_records(run_dir)) != records:
            records, still_since = len(found), time.monotonic()
        time.sleep(0.1)


# --- what its records say -----------------------------------------------------------------------------------------


def records_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind."""
    return [record for record in read_records(run_dir) if record["kind"] == kind]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by optimizer step. A step that was trained again has one record, that of the last time."""
    found: dict[int, tuple[float, float]] = {}
    for record in records_of(run_dir, "step"):
        assert record["step"] not in found, f"step {record['step']} is in the metrics twice"
        found[record["step"]] = (record["loss"], record["grad_norm"])
    return found


def assert_sound(run_dir: Path) -> Counter[str]:
    """Checks that every sample of a whole run was trained once and that no weight version was followed by a lower one.

    Returns: how many records of each kind there are.
    """
    records, samples = read_records(run_dir), ROUNDS * PROMPTS_PER_ROUND
    ledger = read_ledger(records, PROMPTS_PER_ROUND, samples)
    assert (ledger.trained, ledger.lost, ledger.twice) == (samples, [], [])
    versions = [r["weight_version"] for r in records if r["kind"] == "publish"]
    assert versions == sorted(versions)
    assert json.loads((run_dir / "report.json").read_text())["weight_version"] == ROUNDS
    return Counter(r["kind"] for r in records)
