"""Whole runs through real Ray: two rounds, a stop, a kill, resume. `pytest tests/system/test_run.py`"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from opdlm.common.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint
from opdlm.common.config import dump_config
from opdlm.common.errors import ConfigError
from opdlm.common.model.load import load_model
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.timeline import read_spans
from opdlm.deploy.run.directory import open_run
from opdlm.deploy.run.train import train
from tests.system.runs import PROMPTS_PER_ROUND, ROUNDS, losses, run_config, run_until

pytestmark = pytest.mark.ray


def test_two_rounds_with_staleness(ray_cluster, chain_teacher, tmp_path) -> None:
    """The smoke test: decode, score, train and push, for two rounds, with decoding one round ahead."""
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
    assert [report[f"samples_{what}"] for what in ("trained", "lost", "trained_twice", "skipped")] == [16, 0, 0, 0]
    assert report["rollout_tokens"] == sum(r["round_tokens"] for r in rounds) > 0
    assert 0 <= report["student_exact_match_dynamic"] <= 1
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    spans = {(span["track"], span["name"]) for span in read_spans(tmp_path / "run")}
    assert {
        ("rollout-0 slot 0", "sample 0"),
        ("teacher-0", "score"),
        ("learner", "train"),
        ("learner", "wait"),
    } <= spans
    assert {("learner", "publish"), ("learner", "checkpoint"), ("push", "version 2")} <= spans
    before = load_model(tmp_path / "run" / "student_init").state_dict()
    after = load_model(tmp_path / "run" / "student").state_dict()
    assert any(not before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("kind", ["off_policy_kd", pytest.param("cft", marks=pytest.mark.slow)])
def test_given_responses_are_generated_and_trained_on(
    kind, given_responses, ray_cluster, chain_teacher, tmp_path
) -> None:
    """The first run has the teacher answer its prompts; a later run reads the file. `off_policy_kd` scores them."""
    cached = given_responses.exists()
    config = run_config(
        chain_teacher,
        tmp_path / kind,
        run={"rounds": 2},
        objective={"kind": kind, "exclude_eos": False},
        offline={"cache": str(given_responses)},
        learner={"workers": 1},
        evaluation={"final_problems": 0},
    )
    assert train(config, resume=False, console=Console(quiet=True)) == 0
    records = read_records(tmp_path / kind)
    (given,) = [r for r in records if r["kind"] == "offline"]
    assert (given["responses"], given["cached"]) == (2 * PROMPTS_PER_ROUND, cached), "not for rounds that are not made"
    rounds = [r for r in records if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == [1, 2]
    assert all(r["rollout_forward_tokens"] == 0 for r in rounds), "nothing is decoded"
    assert all((r["teacher_forward_tokens"] > 0) == (kind == "off_policy_kd") for r in rounds)
    assert 0 < given["compute_flops"] < rounds[0]["compute_flops"] < rounds[1]["compute_flops"]
    assert all(r["loss"] > 0 for r in records if r["kind"] == "step")


@pytest.fixture(scope="module")
def given_responses(tmp_path_factory) -> Path:
    """The file of the teacher's responses, which the runs of this module share."""
    return tmp_path_factory.mktemp("given") / "responses.parquet"


def test_kill_and_resume_give_the_losses_of_an_unbroken_run(chain_teacher, whole, tmp_path) -> None:
    """SIGKILL to the driver, then --resume: the loss of every step is equal to the bit."""
    broken = tmp_path / "broken"
    code = run_until(run_config(chain_teacher, broken), resume=False, rounds=2, send=signal.SIGKILL)
    assert code == -signal.SIGKILL
    finish_like(whole, broken, chain_teacher)


@pytest.mark.nightly
def test_stop_and_resume_give_the_losses_of_an_unbroken_run(chain_teacher, whole, tmp_path) -> None:
    """SIGTERM to the driver ends with a checkpoint; --resume goes on from there, equal to the bit.

    Nightly: `test_sources.py` has a run stopped by SIGTERM and resumed, and a resume is exact after SIGKILL too.
    """
    broken = tmp_path / "broken"
    code = run_until(run_config(chain_teacher, broken), resume=False, rounds=1, send=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert 1 <= latest_checkpoint(broken / "checkpoints").rounds < ROUNDS
    finish_like(whole, broken, chain_teacher)


def finish_like(whole: Path, broken: Path, teacher: Path) -> None:
    """Resumes a run to its end; its losses, student and state must be those of the unbroken run."""
    assert train(run_config(teacher, broken), resume=True, console=Console(quiet=True)) == 0
    assert losses(broken) == losses(whole)
    ours, theirs = (load_model(root / "student").state_dict() for root in (broken, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    state = latest_checkpoint(broken / "checkpoints").state
    assert (state["rounds"], state["next_sample"]) == (ROUNDS, ROUNDS * PROMPTS_PER_ROUND)


@pytest.mark.slow
def test_rounds_are_trained_again_though_a_checkpoint_of_them_appears_after_the_resume(
    ray_cluster, chain_teacher, whole, tmp_path, monkeypatch
) -> None:
    """The ranks outlive a killed driver for a moment, and may save after the new driver looked for checkpoints."""
    run_dir, late = tmp_path / "run", f"round-{ROUNDS - 1:06d}"
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("student", late, f"round-{ROUNDS:06d}"))

    def open_before_the_last_save(*arguments):
        open_run(*arguments)
        shutil.copytree(whole / "checkpoints" / late, run_dir / "checkpoints" / late)

    monkeypatch.setattr("opdlm.deploy.run.train.open_run", open_before_the_last_save)
    assert train(run_config(chain_teacher, run_dir), resume=True, console=Console(quiet=True)) == 0
    assert losses(run_dir) == losses(whole)


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


def test_cluster_is_left_clean(ray_cluster) -> None:
    """No actor outlives its run. (This test is the last one of the file.)"""
    if not ray.is_initialized():
        ray.init(address=ray_cluster, log_to_driver=False)
    from ray.util import list_named_actors

    assert [
        a for a in list_named_actors(all_namespaces=True) if a["name"].startswith(("rollout", "teacher", "replay"))
    ] == []
