"""`ray job submit` to a cluster of two nodes: placement, stop, resume, refusal.

`pytest tests/system/test_job_submit.py`
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdlm.common.checkpoint import latest_checkpoint, list_checkpoints
from opdlm.deploy.run.paths import inside_job_copy
from tests.patience import PATIENCE
from tests.system.runs import records_of
from tests.system.submitted_cluster import SubmittedCluster, wait_for

MODULE = ["python", "-m", "opdlm"]
SCRIPT = ["opdlm"] if Path(sys.executable).with_name("opdlm").exists() else MODULE
ROUNDS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[SubmittedCluster]:
    """The running cluster."""
    folder = Path(tempfile.mkdtemp(prefix="oj-", dir="/tmp"))
    try:
        cluster = SubmittedCluster(folder)
        with cluster.start():
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def demo(command: list[str], run_dir: Path, teacher: Path, *options: str) -> list[str]:
    """`opdlm train deploy/demo.yaml` with a random teacher and rounds of 8 prompts.

    It asks for 4 CPUs, one more than a node has, and for the resource `train` for its ranks.
    """
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
    """The rounds that were trained, in order."""
    return [record["round"] for record in records_of(run_dir, "round")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_uses_both_nodes_saves_a_checkpoint_when_stopped_and_resumes(cluster, chain_teacher, tmp_path) -> None:
    run_dir = tmp_path / "run"
    # `ray job stop` is started now and waits for a line, because its imports take longer than the rest of the run.
    stop = subprocess.Popen(
        [cluster.python, "-c", "from ray.scripts.scripts import cli; input(); cli(['job', 'stop', 'first'])"],
        env=cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        submitted = cluster.submit("first", demo(MODULE, run_dir, chain_teacher), "--no-wait")
        assert submitted.returncode == 0, submitted.stdout

        places: set[tuple[str, str]] = set()
        """(name, node) of each actor; the name of Ray Train's actors is their class."""

        def trained_a_round() -> bool:
            status = cluster.ask("/api/jobs/first")["status"]
            assert status in ("PENDING", "RUNNING"), cluster.ask("/api/jobs/first/logs")["logs"]
            for actor in cluster.state("actors"):
                if actor["state"] == "ALIVE":
                    places.add((actor["name"] or actor["class_name"], actor["node_id"]))
            return bool(rounds(run_dir))

        wait_for(trained_a_round, "round")
        output, _ = stop.communicate("\n", timeout=PATIENCE)
    finally:
        stop.kill()
        stop.wait()
    assert stop.returncode == 0, output
    ours = {"rollout-0", "teacher-0", "replay-queue", "RayTrainWorker"}
    assert ours <= {name for name, _ in places}
    nodes = cluster.alive_nodes()
    assert len(nodes) == 2
    (second,) = (node["node_id"] for node in cluster.state("nodes") if "train" in node["resources_total"])
    assert {node for name, node in places if name == "RayTrainWorker"} == {second}, "learner.placement asks for it"
    assert {node for name, node in places if name in ours - {"replay-queue"}} == nodes

    assert cluster.ask("/api/jobs/first")["status"] == "STOPPED"
    log = cluster.ask("/api/jobs/first/logs")["logs"]
    assert "stopped with a checkpoint; go on with --resume" in log
    trained = rounds(run_dir)
    assert 1 <= len(trained) < ROUNDS, "the stop came before the end of the run"
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint.rounds == trained[-1], "the round that was in training was finished and saved"

    other_numbers = "--set", "rollout.actors=2", "--set", "learner.workers=1"
    resumed = cluster.submit("second", demo(SCRIPT, run_dir, chain_teacher, *other_numbers, "--resume"))
    assert resumed.returncode == 0, resumed.stdout
    log = cluster.ask("/api/jobs/second/logs")["logs"]
    assert all(line in resumed.stdout for line in log.splitlines()), "the terminal shows the job's log"
    assert f"\nresuming from {checkpoint.folder} (round {checkpoint.rounds} of {ROUNDS})\n" in log
    assert f"round {ROUNDS}/{ROUNDS} " in log
    assert "\x1b[" not in log, "a log is no terminal, so it has plain lines"
    job = cluster.ask("/api/jobs/second")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert rounds(run_dir) == list(range(1, ROUNDS + 1))
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"round-{ROUNDS:06d}"
    assert (run_dir / "student" / "model.safetensors").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_with_relative_paths_is_refused(cluster) -> None:
    """The relative paths of deploy/demo.yaml lead into Ray's copy of the working directory, which Ray deletes."""
    failed = cluster.submit("lost", [*MODULE, "train", "deploy/demo.yaml"])
    assert failed.returncode == 1
    for name, path in (("run.dir", "runs/demo"), ("model.teacher", "models/chain-teacher")):
        assert f"\nopdlm: {name}: {path} is in this job's copy of the working directory" in failed.stdout
    assert "Traceback" not in failed.stdout
    job = cluster.ask("/api/jobs/lost")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


def test_paths_inside_a_job_copy_are_recognised() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
    assert inside_job_copy(copy / "runs/demo") == Path("runs/demo")
    assert inside_job_copy(copy) == Path(".")
    assert inside_job_copy(Path("/shared/runs/demo")) is None
    assert inside_job_copy(Path("/shared/working_dir_files/demo")) is None
