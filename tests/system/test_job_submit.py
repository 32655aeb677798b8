"""`ray job submit` to a cluster of two nodes: spread, stop, resume, refusal. `pytest tests/system/test_job_submit.py`

The cluster is started as a user starts one, by `ray start`, with token authentication, in a Python environment that has
what we depend on but not this package: what runs is what the working directory carried there.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from opdlm.common.checkpoint import latest_checkpoint, list_checkpoints
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.job_paths import inside_job_copy
from tests import REPOSITORY

ROOT = REPOSITORY
RUNTIME_ENV = "deploy/cluster_files/runtime_env.yaml"
MODULE = ["python", "-m", "opdlm"]
INSTALLED = ["opdlm"] if Path(sys.executable).with_name("opdlm").exists() else MODULE
ROUNDS = 60
START_ATTEMPTS = 5
CPUS = 3  # of each node; the run asks for 4, so one node is not enough


class Cluster:
    """A head with a dashboard and one more node, each with a session folder of its own, as on two machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        self.token = token.read_text()
        self.python = _environment_without_us(folder / "venv")
        gcs, self.dashboard, client = _free_ports(3)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        self.env |= {
            "PATH": os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        self.head = (
            *("--head", f"--port={gcs}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}"),
            f"--temp-dir={folder / 'head'}",
        )
        self.node = f"--address=127.0.0.1:{gcs}", f"--temp-dir={folder / 'node'}", '--resources={"train": 2}'

    @contextmanager
    def start(self, options: tuple[str, ...], ready: Callable[[], bool]) -> Iterator[None]:
        """One node, each of its processes ended afterwards."""
        # Other clusters of this machine may have Ray's default ports.
        own = "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"
        own += ("--include-log-monitor=false",)  # nobody reads the actors' own lines here
        size = f"--num-cpus={CPUS}", "--num-gpus=0", "--object-store-memory=200000000"
        command = self.ray("start", "--block", "--node-ip-address=127.0.0.1", *options, *own, *size)
        file = self.folder / "ray-start.log"

        def started() -> bool:
            return process.poll() is not None or ready()

        # `ray start` gives its raylet 30 s and then ends; a busy machine may take longer.
        for _ in range(START_ATTEMPTS):
            with file.open("a") as log:
                process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
            try:
                _wait(started, "node")
                if process.poll() is None:
                    yield
                    return
            finally:
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                process.terminate()
                for left in psutil.wait_procs([*family, process], timeout=60)[1]:
                    left.kill()
                process.wait()
        raise AssertionError(f"ray start ended {START_ATTEMPTS} times:\n{file.read_text()[-2000:]}")

    def ray(self, *arguments: str) -> list[str]:
        """The `ray` command of the environment that the cluster runs in."""
        return [str(self.python), "-m", "ray.scripts.scripts", *arguments]

    def submit(self, name: str, entrypoint: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from the repository's root."""
        command = self.ray(
            "job", "submit", f"--runtime-env={RUNTIME_ENV}", "--working-dir=.", f"--submission-id={name}"
        )
        return subprocess.run(
            [*command, *options, "--", *entrypoint],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )

    def ask(self, path: str) -> Any:
        """What the dashboard's HTTP API answers, with the token."""
        address = f"http://127.0.0.1:{self.dashboard}{path}"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """The state API's list of actors or nodes."""
        return self.ask(f"/api/v0/{kind}?limit=1000")["data"]["result"]["result"]

    def alive_nodes(self) -> set[str]:
        return {node["node_id"] for node in self.state("nodes") if node["state"] == "ALIVE"}


def _environment_without_us(folder: Path) -> Path:
    """A Python that finds the packages of this one, except those that are installed in editable mode; its path."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # A .pth file inside a folder that a .pth file names is not read: no editable package comes along.
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    found = subprocess.run([python, "-c", "import deploy"], cwd=folder, env={}, capture_output=True, text=True)
    assert "No module named 'deploy'" in found.stderr
    return python


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(condition: Callable[[], Any], what: str, seconds: float = 900) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if found := condition():
                return found
        except OSError:  # nobody answers yet
            pass
        time.sleep(0.1)
    raise AssertionError(f"no {what} in {seconds:g} s")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="oj-", dir="/tmp"))  # Ray's socket paths must stay below 107 bytes
    try:
        cluster = Cluster(folder)
        with (
            cluster.start(cluster.head, lambda: len(cluster.alive_nodes()) == 1),
            cluster.start(cluster.node, lambda: len(cluster.alive_nodes()) == 2),
        ):
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def demo(command: list[str], run_dir: Path, teacher: Path, *options: str) -> list[str]:
    """`opdlm train deploy/demo.yaml`, smaller: 4 CPUs, a random teacher, rounds of 8 prompts."""
    settings = {
        "run.dir": run_dir,
        "run.rounds": ROUNDS,
        "model.teacher": teacher,
        "rollout.prompts_per_round": 8,
        "rollout.batch_size": 8,
        "rollout.cpus_per_actor": 1,
        "teacher.cpus_per_actor": 1,
        "learner.batch_size": 4,
        "learner.placement.node_resources": "{train: 1}",
        "rollout.placement.group": "pack",
        "checkpoint.every_rounds": ROUNDS,
        "evaluation.every_rounds": "null",
        "evaluation.final_problems": 0,
    }
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [*command, "train", "deploy/demo.yaml", *overrides, *options]


def rounds(run_dir: Path) -> list[int]:
    return [r["round"] for r in read_records(run_dir) if r["kind"] == "round"]


@pytest.mark.ray
def test_a_job_uses_both_nodes_ends_in_a_checkpoint_when_stopped_and_goes_on(cluster, chain_teacher, tmp_path) -> None:
    run_dir = tmp_path / "run"
    # The command line that stops the job, past its imports, which take longer than the rest of the run.
    stop = subprocess.Popen(
        [cluster.python, "-c", "from ray.scripts.scripts import cli; input(); cli(['job', 'stop', 'first'])"],
        env=cluster.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        submitted = cluster.submit("first", demo(MODULE, run_dir, chain_teacher), "--no-wait")
        assert submitted.returncode == 0, submitted.stdout

        places: set[tuple[str, str]] = set()
        """(name, node) of each actor; Ray Train's have their class for a name."""

        def trains() -> bool:
            status = cluster.ask("/api/jobs/first")["status"]
            assert status in ("PENDING", "RUNNING"), cluster.ask("/api/jobs/first/logs")["logs"]
            for actor in cluster.state("actors"):
                if actor["state"] == "ALIVE":
                    places.add((actor["name"] or actor["class_name"], actor["node_id"]))
            # The last line may be half written: no JSON yet.
            return '"kind": "round"' in (run_dir / "metrics.jsonl").read_text()  # no file yet: an OSError to `_wait`

        _wait(trains, "round")
        output, _ = stop.communicate("\n", timeout=900)
    finally:
        stop.kill()
        stop.wait()
    assert stop.returncode == 0, output
    ours = {"rollout-0", "teacher-0", "replay-queue", "RayTrainWorker"}
    assert ours <= {name for name, _ in places}
    nodes = cluster.alive_nodes()
    assert len(nodes) == 2
    (second,) = (node["node_id"] for node in cluster.state("nodes") if "train" in node["resources_total"])
    assert {node for name, node in places if name == "RayTrainWorker"} == {second}, "as learner.placement has it"
    assert {node for name, node in places if name in ours - {"replay-queue"}} == nodes

    assert cluster.ask("/api/jobs/first")["status"] == "STOPPED"
    log = cluster.ask("/api/jobs/first/logs")["logs"]
    assert "stopped with a checkpoint; go on with --resume" in log
    trained = rounds(run_dir)
    assert 1 <= len(trained) < ROUNDS, "stopped before the run's end"
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint.rounds == trained[-1], "the round under way was trained to its end and saved"

    other_numbers = "--set", "rollout.actors=2", "--set", "learner.workers=1"
    resumed = cluster.submit("second", demo(INSTALLED, run_dir, chain_teacher, *other_numbers, "--resume"))
    assert resumed.returncode == 0, resumed.stdout
    log = cluster.ask("/api/jobs/second/logs")["logs"]
    assert all(line in resumed.stdout for line in log.splitlines()), "the terminal shows the job's log"
    assert f"\nresuming from {checkpoint.folder} (round {checkpoint.rounds} of {ROUNDS})\n" in log
    assert f"round {ROUNDS}/{ROUNDS} " in log
    assert "\x1b[" not in log, "plain lines: a log is no terminal"
    job = cluster.ask("/api/jobs/second")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert rounds(run_dir) == list(range(1, ROUNDS + 1))
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"round-{ROUNDS:06d}"
    assert (run_dir / "student" / "model.safetensors").exists()


@pytest.mark.ray
def test_results_are_not_written_where_ray_deletes_them(cluster) -> None:
    """deploy/demo.yaml as it is has relative paths, which in a job are inside Ray's copy of the working directory."""
    failed = cluster.submit("lost", [*MODULE, "train", "deploy/demo.yaml"])
    assert failed.returncode == 1
    for name, path in (("run.dir", "runs/demo"), ("model.teacher", "models/chain-teacher")):
        assert f"\nopdlm: {name}: {path} is in this job's copy of the working directory" in failed.stdout
    assert "Traceback" not in failed.stdout
    job = cluster.ask("/api/jobs/lost")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


def test_what_is_inside_a_job_copy() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
    assert inside_job_copy(copy / "runs/demo") == Path("runs/demo")
    assert inside_job_copy(copy) == Path(".")
    assert inside_job_copy(Path("/shared/runs/demo")) is None
    assert inside_job_copy(Path("/shared/working_dir_files/demo")) is None
