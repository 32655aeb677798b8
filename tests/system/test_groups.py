"""Runs of a policy gradient: groups of responses stay whole, whoever dies. `pytest tests/system/test_groups.py`"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from opdlm.common.config import OpdlmConfig
from opdlm.deploy.observe.report import BEFORE, DYNAMIC, PERIODIC, STATIC
from tests.system.runs import (
    ROUNDS,
    assert_sound,
    losses,
    records_of,
    run_config,
    run_until,
    train_here,
    wait_for_rounds,
)
from tests.system.test_deaths import kill_one_after_another

pytestmark = pytest.mark.ray


def policy_config(teacher: Path, run_dir: Path, /, **sections) -> OpdlmConfig:
    """Two prompts a round, four responses each, a reference, and a reward that differs from response to response."""
    base = {
        "objective": {"kind": "rl", "kl_beta": 0.05},
        "reward": {"kind": "python", "function": "tests.system.rewards:variety"},
        "rollout": {"prompts_per_round": 2, "responses_per_prompt": 4, "temperature": 1.0},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return run_config(teacher, run_dir, **base)


@pytest.fixture(scope="module")
def unbroken(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("policy") / "unbroken"
    train_here(policy_config(chain_teacher, run_dir))
    return run_dir


@pytest.mark.slow
def test_what_a_run_says(unbroken) -> None:
    assert_sound(unbroken)
    steps, rounds = records_of(unbroken, "step"), records_of(unbroken, "round")
    assert len(steps) == 2 * ROUNDS
    assert len(rounds) == ROUNDS
    first = steps[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-3), "the first step of a round is on policy"
    assert first["clipped_share"] == 0
    assert first["reference_kl"] == pytest.approx(0, abs=1e-5)
    assert all(np.isfinite(step["loss"]) and step["reference_kl"] >= 0 for step in steps)
    assert all(record["reward_std"] > 0 and record["reward_equal_groups_share"] == 0 for record in rounds)


@pytest.mark.slow
def test_actors_die_in_a_call_and_then_the_queue(unbroken, chain_teacher, victims, tmp_path) -> None:
    """The run goes back to its last checkpoint, with rewards of the rounds that are made again."""
    run_dir, roles = tmp_path / "run", ("rollout", "reward", "queue")
    config = policy_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})
    train_here(config, meanwhile=lambda: kill_one_after_another(roles, victims, run_dir))
    assert assert_sound(run_dir)["queue_death"] == 1
    first, second = (record["role"] for record in records_of(run_dir, "actor_death"))
    assert first in ("rollout", "reference"), "both are of one class, and so are their processes"
    assert second == "reward"
    assert losses(run_dir) == losses(unbroken)


@pytest.mark.nightly
def test_a_learner_rank_dies(unbroken, chain_teacher, victims, tmp_path) -> None:
    """Nightly: `test_deaths.py` has a rank die, and what the queue gives again does not depend on the objective."""
    run_dir = tmp_path / "run"

    def kill() -> None:
        wait_for_rounds(run_dir, 3)
        victims.kill("learner")

    train_here(policy_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2}), meanwhile=kill)
    assert_sound(run_dir)
    assert losses(run_dir) == losses(unbroken)


@pytest.mark.nightly
def test_the_driver_dies_and_the_run_is_resumed(unbroken, chain_teacher, tmp_path) -> None:
    """Nightly: `test_run.py` has a driver die, and the queue death above has rewards made again."""
    config = policy_config(chain_teacher, tmp_path / "run")
    assert run_until(config, False, 2, signal.SIGKILL) == -signal.SIGKILL
    train_here(config, resume=True)
    assert_sound(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(unbroken)


@pytest.mark.slow
def test_rounds_ahead_train_on_what_older_weights_drew(chain_teacher, ray_cluster, tmp_path) -> None:
    """And questions of one's own are asked, though no teacher answers them too."""
    run_dir, questions = tmp_path / "run", tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(f'{{"prompt": "{n}+3-4=", "answers": "{n - 1}", "kind": "sums"}}\n' for n in range(10, 14))
    )
    ahead = {"queue": {"max_staleness": 1}, "objective": {"kind": "rl", "selection": "one_sampled_state"}}
    asked = {"evaluation": {"data": str(questions), "every_rounds": 3}}
    learner = {"workers": 1, "optimizer": {"lr": 1e-2}}
    train_here(policy_config(chain_teacher, run_dir, **ahead, **asked, learner=learner))
    assert_sound(run_dir)
    evaluations = records_of(run_dir, "evaluation")
    assert {record["row"] for record in evaluations} == {BEFORE, PERIODIC, STATIC, DYNAMIC}
    assert all(record["by_kind"]["sums"]["questions"] == 4 and record["of_teacher"] is None for record in evaluations)
    changes = [step["logprob_change"] for step in records_of(run_dir, "step")]
    assert max(changes[2:]) > 1e-4, "the old log-probabilities are those that the tokens were drawn with"
