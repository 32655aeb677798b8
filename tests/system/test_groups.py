"""Runs of a policy gradient: groups of responses stay whole, whoever dies. `pytest tests/system/test_groups.py`"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from opdlm.common.config import OpdlmConfig
from opdlm.deploy.observe.report import BEFORE, DYNAMIC, PERIODIC, STATIC
from tests.patience import PATIENCE
from tests.system.runs import ROUNDS, assert_sound, losses, records_of, run_config, run_until, running, wait_for_rounds
from tests.system.test_deaths import kill_during_a_call

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
    with running(policy_config(chain_teacher, run_dir)) as process:
        assert process.wait(timeout=PATIENCE) == 0
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
def test_actors_die_in_a_call(unbroken, chain_teacher, victims, tmp_path) -> None:
    run_dir = tmp_path / "run"
    with running(policy_config(chain_teacher, run_dir)) as process:
        for role in ("rollout", "reward"):
            rounds = len(records_of(run_dir, "round")) + 1  # training one more needs the actor that died before
            victim = victims.find(role)
            wait_for_rounds(run_dir, rounds, process)
            kill_during_a_call(victim, run_dir)
        assert process.wait(timeout=PATIENCE) == 0
    assert_sound(run_dir)
    first, second = (record["role"] for record in records_of(run_dir, "actor_death"))
    assert first in ("rollout", "reference"), "both are of one class, and so are their processes"
    assert second == "reward"
    assert losses(run_dir) == losses(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["queue", "learner"])
def test_the_run_goes_back(unbroken, chain_teacher, victims, tmp_path, role) -> None:
    """With rewards of the rounds that are made again."""
    run_dir = tmp_path / "run"
    with running(policy_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})) as process:
        wait_for_rounds(run_dir, 3, process)
        victims.kill(role)
        assert process.wait(timeout=PATIENCE) == 0
    assert_sound(run_dir)
    assert losses(run_dir) == losses(unbroken)


@pytest.mark.slow
def test_the_driver_dies_and_the_run_is_resumed(unbroken, chain_teacher, tmp_path) -> None:
    config = policy_config(chain_teacher, tmp_path / "run")
    assert run_until(config, False, 2, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(config, True, ROUNDS, signal.SIGTERM) in (0, 128 + signal.SIGTERM)
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
    with running(
        policy_config(chain_teacher, run_dir, **ahead, **asked, learner={"optimizer": {"lr": 1e-2}})
    ) as process:
        assert process.wait(timeout=PATIENCE) == 0
    assert_sound(run_dir)
    evaluations = records_of(run_dir, "evaluation")
    assert {record["row"] for record in evaluations} == {BEFORE, PERIODIC, STATIC, DYNAMIC}
    assert all(record["by_kind"]["sums"]["questions"] == 4 and record["of_teacher"] is None for record in evaluations)
    changes = [step["logprob_change"] for step in records_of(run_dir, "step")]
    assert max(changes[2:]) > 1e-4, "the old log-probabilities are those that the tokens were drawn with"
