"""A run under random kills: checks that it goes on and trains every prompt exactly once. `make chaos`, `make soak`.

    python -m tests.chaos --rounds 40            # an unbroken run, then the same run under kills; compares the losses
    python -m tests.chaos --minutes 30           # kills for 30 minutes; measures the memory of each role

Runs the demo with two rollout and two teacher actors on two nodes, both on this machine. Again and again it sends
SIGKILL to a process of a random kind: a rollout actor, a teacher actor, a learner rank, the replay queue, the second
node, or the driver (which it starts again with `--resume`). After each kill it waits for the next trained round.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from opdlm.common.config import OpdlmConfig, dump_config, load_config
from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.preflight import preflight
from tests import REPOSITORY
from tests.system.victims import Victims, raylets_of

KINDS = ("rollout", "teacher", "learner", "queue", "node", "driver")
_NODE = {"num_cpus": 8, "num_gpus": 0}
_WARM_UP_SECONDS = 60.0
"""Age from which a process's memory is measured. By then, models, libraries and the first batches are loaded."""

out = Console()


class Chaos:
    """A cluster with a run in it, whose processes are killed.

    Args:
        kinds: what may be killed, of KINDS.
    """

    def __init__(self, config: OpdlmConfig, seed: int, kinds: list[str]) -> None:
        self.config, self.run_dir, self.kinds = config, Path(config.run.dir), kinds
        self.random = random.Random(seed)
        self.cluster = Cluster(initialize_head=True, head_node_args=_NODE | {"include_dashboard": False})
        self.victims = Victims(lambda: raylets_of(self.cluster))
        self.second = self.cluster.add_node(**_NODE)
        self.recoveries: dict[str, list[float]] = defaultdict(list)
        """Seconds from each kill to the next trained round, by kind."""
        self.memory: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        """(age in seconds, private memory in MiB) by role and process id."""
        self.driver = self._start(resume=False)

    def _start(self, resume: bool) -> subprocess.Popen:
        file = self.run_dir.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_config(self.config))
        command = [sys.executable, "-m", "opdlm", "train", str(file), *(["--resume"] if resume else [])]
        log = self.run_dir.with_suffix(".log").open("a")
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, env=environment)

    def go(self, pause_seconds: float, minutes: float | None) -> int:
        """Kills until the run has ended or the minutes are over; returns the driver's last exit code."""
        started = time.monotonic()
        self._await_round("start", set())
        while minutes is None or time.monotonic() - started < 60 * minutes:
            if self._pause(self.random.uniform(0.5, 1.5) * pause_seconds):
                break
            kind = self.random.choice(self.kinds)
            seen = self._rounds()
            out.print(f"{time.monotonic() - started:6.0f} s  round {max(r for r, _ in seen)}: killing {kind}")
            self._kill(kind)
            self._await_round(kind, seen)
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGTERM)
        return self.driver.wait(timeout=300)

    def _pause(self, seconds: float) -> bool:
        """Measures memory for some time; returns whether the run has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.driver.poll() is None:
            self._measure_memory()
            time.sleep(min(5.0, max(until - time.monotonic(), 0)))
        return self.driver.poll() is not None

    def _kill(self, kind: str) -> None:
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.driver = self._start(resume=True)
        elif kind == "node":
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = self.cluster.add_node(**_NODE)
        else:
            self.victims.kill(kind)

    def _rounds(self) -> set[tuple[int, float]]:
        return {(r["round"], r["wall_seconds"]) for r in read_records(self.run_dir) if r["kind"] == "round"}

    def _await_round(self, kind: str, seen: set[tuple[int, float]], patience_seconds: float = 600) -> None:
        """Waits until a round is trained that is not in `seen`, or the run has ended."""
        killed = time.monotonic()
        while self.driver.poll() is None and not self._rounds() - seen:
            if time.monotonic() - killed > patience_seconds:
                raise SystemExit(
                    f"no round was trained in {patience_seconds:g} s after killing {kind}; {self.run_dir}.log"
                )
            time.sleep(0.2)
        self.recoveries[kind].append(time.monotonic() - killed)

    def _measure_memory(self) -> None:
        found = [*self.victims.all(), ("driver", psutil.Process(self.driver.pid))]
        for role, process in found:
            try:
                age = time.time() - process.create_time()
                if age > _WARM_UP_SECONDS:
                    self.memory[role, process.pid].append((age, process.memory_full_info().uss / 2**20))
            except psutil.Error:
                continue  # it has ended meanwhile

    def close(self) -> None:
        """Ends the driver and the cluster."""
        self.driver.kill()
        self.driver.wait()
        self.cluster.shutdown()


def report(chaos: Chaos, code: int, total: int) -> bool:
    """Prints what happened; returns whether no sample was lost or trained twice and no weight version fell.

    Args:
        code: exit code of the driver; total: samples in the whole run.
    """
    table = Table(title="kills, and seconds until the next trained round")
    for name in ("killed", "times", "median s", "longest s"):
        table.add_column(name, justify="left" if name == "killed" else "right")
    for kind, seconds in sorted(chaos.recoveries.items()):
        table.add_row(kind, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")
    out.print(table)

    table = Table(title=f"private memory of processes older than {_WARM_UP_SECONDS:.0f} s")
    for name in ("role", "processes", "median MiB", "longest measured, min", "its growth, MiB"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for role in sorted({role for role, _ in chaos.memory}):
        measured = [samples for (r, _), samples in chaos.memory.items() if r == role]
        longest = max(measured, key=lambda samples: samples[-1][0] - samples[0][0])
        table.add_row(
            role,
            str(len(measured)),
            f"{statistics.median(mib for samples in measured for _, mib in samples):.0f}",
            f"{(longest[-1][0] - longest[0][0]) / 60:.1f}",
            f"{longest[-1][1] - longest[0][1]:+.1f}",
        )
    out.print(table)

    records = read_records(chaos.run_dir)
    kinds = Counter(r["kind"] for r in records)
    again = sum(r["lost_steps"] for r in records if r["kind"] == "learner_restart")
    ledger = read_ledger(records, chaos.config.rollout.prompts_per_round, total)
    versions = [r["weight_version"] for r in records if r["kind"] == "publish"]
    rounds = [r for r in records if r["kind"] == "round"]
    never_fall = versions == sorted(versions)  # equal ones follow each other: a restarted learner publishes again
    for line in (
        f"exit code {code}; {kinds['round']} rounds, {kinds['step']} optimizer steps",
        f"recorded: {kinds['actor_death']} deaths of actors, {kinds['queue_death']} of the queue, "
        f"{kinds['learner_restart']} restarts of the learner ({again} steps done again), "
        f"{kinds['failure']} calls tried again, {rounds[-1]['samples_made_again']} samples made again",
        f"samples trained {ledger.trained}, lost {len(ledger.lost)}, trained twice {len(ledger.twice)}",
        f"weight versions {'never fall' if never_fall else 'FALL'}",
        f"staleness <= {max(r['staleness_max'] for r in rounds)}",
    ):
        out.print(line, highlight=False)
    return not ledger.lost and not ledger.twice and never_fall


def compare_losses(run_dir: Path, unbroken: Path) -> None:
    """Prints how much the losses of the steps differ from those of the unbroken run."""
    losses, expected = (
        {r["step"]: r["loss"] for r in read_records(folder) if r["kind"] == "step"} for folder in (run_dir, unbroken)
    )
    shared = losses.keys() & expected.keys()
    equal = sum(losses[step] == expected[step] for step in shared)
    worst = max(abs(losses[step] - expected[step]) / abs(expected[step]) for step in shared)
    out.print(
        f"losses of {len(shared)} steps against the unbroken run: {equal} equal to the bit, "
        f"largest relative difference {worst:.2e}"
    )


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of the run, if --minutes is not given.")] = 40,
    minutes: Annotated[float | None, typer.Option(help="Kill for this many minutes; without an unbroken run.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the kills.")] = 0,
    pause: Annotated[float, typer.Option(help="Mean seconds from a trained round to the next kill.")] = 8.0,
    kinds: Annotated[str, typer.Option(help="Kinds of processes that are killed, separated by commas.")] = ",".join(
        KINDS
    ),
    staleness: Annotated[int, typer.Option(help="queue.max_staleness.")] = 0,
    run_dir: Annotated[Path, typer.Option("--out", help="Folder of the runs; must not exist.")] = Path("runs/chaos"),
) -> None:
    """Run the demo under random kills."""
    settings = [
        f"run.rounds={rounds if minutes is None else 10_000}",
        f"queue.max_staleness={staleness}",
        *("rollout.actors=2", "rollout.cpus_per_actor=1", "rollout.batch_size=32"),
        *("teacher.actors=2", "teacher.cpus_per_actor=1"),
        *("evaluation.every_rounds=null", "evaluation.final_problems=0", "checkpoint.every_rounds=5"),
        *("resources.actor_restarts=100000", "learner.max_failures=100000", "resources.call_timeout_seconds=300"),
    ]
    broken = load_config(REPOSITORY / "deploy" / "demo.yaml", [*settings, f"run.dir={run_dir.resolve()}/broken"])
    if run_dir.exists():
        raise SystemExit(f"--out: {run_dir} exists; remove it or give another")
    if minutes is None:
        whole = broken.model_copy(update={"run": broken.run.model_copy(update={"dir": f"{run_dir.resolve()}/whole"})})
        chaos = Chaos(whole, seed, [])
        try:
            code = chaos.driver.wait()
        finally:
            chaos.close()
        if code:
            raise SystemExit(f"the unbroken run ended with {code}; see {whole.run.dir}.log")
    chaos = Chaos(broken, seed, kinds.split(","))
    try:
        code = chaos.go(pause, minutes)
    finally:
        chaos.close()
    sound = report(chaos, code, preflight(broken).schedule.total)
    if minutes is None:
        compare_losses(run_dir / "broken", run_dir / "whole")
    raise SystemExit(0 if sound and code in (0, 128 + signal.SIGTERM) else 1)


if __name__ == "__main__":
    typer.run(main)
