"""Whole runs through real Ray: two rounds, a stop, a kill, resume. `pytest tests/test_run.py`"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from common.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint
from common.config import OpdlmConfig, config_from_dict, dump_config
from common.errors import ConfigError
from common.models import load_model
from deploy.telemetry import read_records
from deploy.train_job import train

pytestmark = pytest.mark.ray

ROUNDS = 6


def run_config(teacher: Path, run_dir: Path, **sections) -> OpdlmConfig:
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


def test_two_rounds_with_staleness(ray_cluster, chain_teacher, tmp_path) -> None:
    """The smoke test: decode, score, train, push, twice, with decoding a round ahead."""
    config = run_config(
        chain_teacher, tmp_path / "run", run={"rounds": 2}, queue={"max_staleness": 1}, learner={"workers": 1}
    )
    started = time.monotonic()
    assert train(config, resume=False, console=Console(quiet=True)) == 0
    print(f"two rounds took {time.monotonic() - started:.0f} s")
    records = read_records(tmp_path / "run")
    rounds = [r for r in records if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == [1, 2]
    assert rounds[-1]["staleness_max"] <= 1
    assert (rounds[-1]["refused_duplicate"], rounds[-1]["refused_stale"]) == (0, 0)
    assert {r["kind"] for r in records} == {"data", "step", "round", "publish", "checkpoint", "evaluation"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["weight_version"] == 2
    assert report["optimizer_steps"] == 4
    assert report["rollout_tokens"] == sum(r["round_tokens"] for r in rounds) > 0
    assert 0 <= report["student_exact_match_dynamic"] <= 1
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    before = load_model(tmp_path / "run" / "student_init").state_dict()
    after = load_model(tmp_path / "run" / "student").state_dict()
    assert any(not before[name].equal(after[name]) for name in before)


def test_given_responses_are_made_once_and_trained_on(ray_cluster, chain_teacher, tmp_path) -> None:
    """`cft` has the teacher answer every prompt; `off_policy_kd` takes the same file and has it scored."""
    cache = tmp_path / "responses.parquet"
    for kind, cached in (("cft", False), ("off_policy_kd", True)):
        config = run_config(
            chain_teacher,
            tmp_path / kind,
            run={"rounds": 2},
            objective={"kind": kind, "exclude_eos": False},
            offline={"cache": str(cache)},
            learner={"workers": 1},
            evaluation={"final_problems": 0},
        )
        assert train(config, resume=False, console=Console(quiet=True)) == 0
        records = read_records(tmp_path / kind)
        (given,) = [r for r in records if r["kind"] == "offline"]
        assert (given["responses"], given["cached"]) == (20, cached)
        rounds = [r for r in records if r["kind"] == "round"]
        assert [r["round"] for r in rounds] == [1, 2]
        assert all(r["rollout_forward_tokens"] == 0 for r in rounds), "nothing is decoded"
        assert all((r["teacher_forward_tokens"] > 0) == (kind == "off_policy_kd") for r in rounds)
        assert 0 < given["compute_flops"] < rounds[0]["compute_flops"] < rounds[1]["compute_flops"]
        assert all(r["loss"] > 0 for r in records if r["kind"] == "step")


@pytest.fixture(scope="module")
def whole(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken") / "whole"
    assert train(run_config(chain_teacher, folder), resume=False, console=Console(quiet=True)) == 0
    assert len(losses(folder)) == 2 * ROUNDS
    return folder


def test_stop_kill_and_resume_give_the_losses_of_an_unbroken_run(chain_teacher, whole, tmp_path) -> None:
    """SIGTERM, then SIGKILL of the driver, each followed by --resume: step by step the same losses, to the bit."""
    broken, expected = tmp_path / "broken", losses(whole)

    code = run_until(run_config(chain_teacher, broken), resume=False, rounds=1, send=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    stopped_at = latest_checkpoint(broken / "checkpoints").rounds
    assert 1 <= stopped_at < ROUNDS

    code = run_until(run_config(chain_teacher, broken), resume=True, rounds=stopped_at + 1, send=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert train(run_config(chain_teacher, broken), resume=True, console=Console(quiet=True)) == 0
    assert losses(broken) == expected
    ours, theirs = (load_model(root / "student").state_dict() for root in (broken, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    state = latest_checkpoint(broken / "checkpoints").state
    assert (state["rounds"], state["next_sample"]) == (ROUNDS, ROUNDS * 8)


def test_a_rollout_actor_and_a_teacher_die_and_nothing_changes(chain_teacher, whole, tmp_path) -> None:
    """SIGKILL of both while they may be at work: Ray restarts them, the calls are repeated, the losses are the same."""
    run_dir = tmp_path / "run"
    process = start(run_config(chain_teacher, run_dir), resume=False)
    try:
        wait_for_rounds(run_dir, 1, process)
        kill_one("RolloutActor", "rollout-0")
        wait_for_rounds(run_dir, 2, process)
        kill_one("TeacherActor", "teacher-0")
        assert process.wait(timeout=400) == 0
    finally:
        process.kill()
        process.wait()
    assert losses(run_dir) == losses(whole)


def test_learner_rank_killed_restarts_from_its_checkpoint(ray_cluster, chain_teacher, tmp_path) -> None:
    """SIGKILL of one rank: Ray Train restarts the group, the queue hands out the same rounds again."""
    run_dir = tmp_path / "run"
    process = start(run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2}), resume=False)
    try:
        wait_for_rounds(run_dir, 3, process)
        kill_one("RayTrainWorker")
        assert process.wait(timeout=400) == 0
    finally:
        process.kill()
        process.wait()
    steps = [r["step"] for r in read_records(run_dir) if r["kind"] == "step"]
    assert set(steps) == set(range(1, 2 * ROUNDS + 1))
    assert json.loads((run_dir / "report.json").read_text())["weight_version"] == ROUNDS


def test_resume_refuses_another_config_and_a_run_refuses_to_be_overwritten(
    ray_cluster, chain_teacher, tmp_path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match="holds no run; start it without --resume"):
        train(run_config(chain_teacher, run_dir), resume=True, console=Console(quiet=True))
    assert not run_dir.exists()
    (run_dir / "checkpoints").mkdir(parents=True)
    config = run_config(chain_teacher, run_dir)
    (run_dir / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match=r"already holds a run \(0 checkpoints\); continue it with --resume"):
        train(config, resume=False, console=Console(quiet=True))
    state = {"rounds": 0, "optimizer_steps": 0, "data_digest": "other"}
    save_checkpoint(run_dir / "checkpoints", state, lambda folder: None, keep=1)
    with pytest.raises(ConfigError, match="the prompts are not those that"):
        train(config, resume=True, console=Console(quiet=True))
    other = run_config(chain_teacher, run_dir, objective={"divergence": "jsd"}, rollout={"block_size": 8})
    with pytest.raises(ConfigError) as caught:
        train(other, resume=True, console=Console(quiet=True))
    assert "objective.divergence (was 'kl', now 'jsd')" in str(caught.value)
    assert "rollout.block_size (was 4, now 8)" in str(caught.value)
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["round-000000"]


def test_more_gpus_than_there_are(ray_cluster, chain_teacher, tmp_path) -> None:
    config = run_config(chain_teacher, tmp_path / "run", rollout={"gpus_per_actor": 1, "actors": 3})
    with pytest.raises(ConfigError, match=r"the run asks for 3 GPUs \(rollout 3 x 1\), the cluster has 0"):
        train(config, resume=False, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def start(config: OpdlmConfig, resume: bool) -> subprocess.Popen:
    """`opdlm train` in a process of its own."""
    file = Path(config.run.dir).with_suffix(".yaml")
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "deploy.cli", "train", str(file)] + (["--resume"] if resume else [])
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)


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
        file = run_dir / "metrics.jsonl"
        done = [json.loads(x) for x in file.read_text().splitlines() if x.endswith("}")] if file.exists() else []
        if any(r["kind"] == "checkpoint" and r["round"] >= rounds - 1 for r in done) and any(
            r["kind"] == "round" and r["round"] >= rounds for r in done
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"no round {rounds} in 400 s")


def kill_one(*titles: str) -> None:
    """SIGKILL to one actor process of this machine, by the titles that Ray gives it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue  # ended meanwhile
            if title.startswith("ray::") and any(t in title for t in titles):
                found.append(int(entry.name))
    assert found, f"no process of {titles}"
    os.kill(found[0], signal.SIGKILL)


def test_cluster_is_left_clean(ray_cluster) -> None:
    """No actor of ours outlives its run (this test runs last in the file)."""
    if not ray.is_initialized():
        ray.init(address=ray_cluster, log_to_driver=False)
    from ray.util import list_named_actors

    assert [
        a for a in list_named_actors(all_namespaces=True) if a["name"].startswith(("rollout", "teacher", "replay"))
    ] == []
