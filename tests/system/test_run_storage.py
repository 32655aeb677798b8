"""Whole runs on a full disk, and runs that are resumed with other numbers of processes.

One rank is enough where no loss is compared with those of another run.

`pytest tests/system/test_run_storage.py`
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from opdlm.common.checkpoint import latest_checkpoint, list_checkpoints
from opdlm.common.errors import OpdlmError
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.train import train
from tests.system.full_disk import SmallDisk, small_disk
from tests.system.runs import ROUNDS, losses, run_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUIET = Console(quiet=True)
NO_EVALUATION = {"final_problems": 0}


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    """A disk of four megabytes."""
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def on_record(monkeypatch) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Has a function called with each record of the next run. The learner's next save waits until it has returned."""

    def install(show: Callable[[dict[str, Any]], None]) -> None:
        view = type("View", (), {"show": lambda self, record: show(record)})
        monkeypatch.setattr("opdlm.deploy.run.train.open_view", lambda *_: contextlib.nullcontext(view()))

    return install


def test_a_run_survives_a_failed_checkpoint_ends_after_two_in_a_row_and_resumes_from_the_last_whole_one(
    ray_cluster, chain_teacher, whole, disk, on_record, tmp_path
) -> None:
    """The disk is full when round 2 is saved, has room for round 3, and is full for rounds 4 and 5."""
    run_dir = tmp_path / "run"

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "data":
            (run_dir / "checkpoints").symlink_to(disk.folder)
        if record["kind"] == "checkpoint":  # of rounds 1 and 3
            disk.fill()
        if record["kind"] == "failed_save" and record["round"] == 2:
            disk.empty()

    on_record(show)
    config = run_config(chain_teacher, run_dir, checkpoint={"max_failed_saves": 1, "keep": 1}, evaluation=NO_EVALUATION)
    message = (
        r"the checkpoint of round 5 was not written \(2 in a row, checkpoint.max_failed_saves 1\): .*No space left on "
        rf"device.* MB to write, 0.0 MB free\); the newest whole checkpoint is {re.escape(str(run_dir))}/checkpoints/"
        r"round-000003; make room and go on with --resume"
    )
    with pytest.raises(OpdlmError, match=message):
        train(config, resume=False, console=QUIET)
    records = read_records(run_dir)
    assert [r["round"] for r in records if r["kind"] == "checkpoint"] == [1, 3]
    failed = [r for r in records if r["kind"] == "failed_save"]
    assert [(r["round"], r["in_a_row"]) for r in failed] == [(2, 1), (4, 1), (5, 2)]
    assert all("No space left on device" in r["reason"] for r in failed)
    disk.empty()
    on_record(lambda record: None)
    assert train(config, resume=True, console=QUIET) == 0
    assert losses(run_dir) == losses(whole)
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == [f"round-{ROUNDS:06d}"]


@pytest.mark.parametrize("what", ["checkpoints", "rollouts"])
def test_a_run_ends_where_its_last_checkpoint_or_kept_rollouts_cannot_be_written(
    ray_cluster, chain_teacher, disk, on_record, tmp_path, what
) -> None:
    run_dir = tmp_path / "run"

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "data":
            (run_dir / what).symlink_to(disk.folder)
            disk.fill()

    on_record(show)
    config = run_config(
        chain_teacher,
        run_dir,
        run={"rounds": 2, "dump_rollouts": what == "rollouts"},
        checkpoint={"every_rounds": 10},
        learner={"workers": 1},
        evaluation=NO_EVALUATION,
    )
    message = {
        "checkpoints": r"the checkpoint of round 2 was not written \(the run's last\): .*there is no checkpoint in",
        "rollouts": r"run/rollouts could not be written: .*there is no checkpoint in",
    }[what]
    with pytest.raises(OpdlmError, match=message) as caught:
        train(config, resume=False, console=QUIET)
    assert "No space left on device" in str(caught.value)
    assert not (run_dir / "student").exists()


def test_a_student_that_could_not_be_written_is_written_by_a_resume(
    ray_cluster, chain_teacher, whole, disk, on_record
) -> None:
    run_dir = disk.folder / "run"
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("ray_train", "student"))
    config = run_config(chain_teacher, run_dir, learner={"workers": 1}, evaluation=NO_EVALUATION)

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "data":
            disk.fill(leave=16384)  # enough for the records of this run, too little for the weights

    on_record(show)
    message = r"run/student could not be written: .*No space left on device.*; the newest whole checkpoint is .*/round-"
    with pytest.raises(OpdlmError, match=message):
        train(config, resume=True, console=QUIET)
    assert [p.name for p in run_dir.iterdir() if "student" in p.name] == ["student_init"]
    disk.empty()
    on_record(lambda record: None)
    assert train(config, resume=True, console=QUIET) == 0
    ours, theirs = (root / "student" / "model.safetensors" for root in (run_dir, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_metrics_that_cannot_be_written_end_the_run_with_a_checkpoint(
    ray_cluster, chain_teacher, disk, on_record, tmp_path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to(disk.folder / "metrics.jsonl")

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "round" and record["round"] == 1:
            disk.fill(leave=0)

    on_record(show)
    config = run_config(chain_teacher, run_dir, learner={"workers": 1}, evaluation=NO_EVALUATION)
    with pytest.raises(OpdlmError, match=r"metrics.jsonl: No space left on device; .* go on with --resume"):
        train(config, resume=False, console=QUIET)
    saved = latest_checkpoint(run_dir / "checkpoints").rounds
    assert 1 <= saved < ROUNDS
    disk.empty()
    on_record(lambda record: None)
    assert train(config, resume=True, console=QUIET) == 0
    assert set(losses(run_dir)) >= set(range(2 * saved + 1, 2 * ROUNDS + 1))


@pytest.mark.parametrize(
    ("workers", "stage", "rollouts", "teachers"),
    [(1, 3, 2, 1), pytest.param(3, 1, 1, 2, marks=pytest.mark.nightly)],
)
def test_a_run_resumes_with_other_numbers_of_processes(
    ray_cluster, chain_teacher, whole, tmp_path, workers, stage, rollouts, teachers
) -> None:
    """From a checkpoint of two ZeRO-2 ranks, with other numbers of ranks and actors and another ZeRO stage.

    Nightly with more ranks than before, which takes the most processes and the same steps as with fewer.
    """
    run_dir, saved = tmp_path / "run", 3
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("ray_train", "student", "report*"))
    for folder in list_checkpoints(run_dir / "checkpoints")[saved:]:
        shutil.rmtree(folder)
    config = run_config(
        chain_teacher,
        run_dir,
        learner={"workers": workers, "zero": {"stage": stage}},
        rollout={"actors": rollouts},
        teacher={"actors": teachers},
        evaluation=NO_EVALUATION,
    )
    assert train(config, resume=True, console=QUIET) == 0
    found, expected = losses(run_dir), losses(whole)
    assert found.keys() == expected.keys()
    for step, figures in expected.items():
        tolerance = 1e-4 if step > 2 * saved else 0
        assert found[step] == pytest.approx(figures, rel=tolerance, abs=tolerance), f"step {step}"
    assert any(found[step] != expected[step] for step in expected), "it ran with the numbers of the unbroken run"
