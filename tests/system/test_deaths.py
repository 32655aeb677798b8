"""Each role of a run dies by SIGKILL, through real Ray; actors are added and removed.

`pytest tests/system/test_deaths.py`

The driver's death is in `test_run.py`. `make chaos` kills all roles at random, for longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.errors import OpdlmError
from opdlm.deploy.cluster.scaling import request_scale
from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import read_records
from tests.conftest import start_node
from tests.patience import PATIENCE, wait_until
from tests.system.runs import (
    PROMPTS_PER_ROUND,
    assert_sound,
    let_go,
    losses,
    records_of,
    run_config,
    running,
    train_here,
    wait_for_rounds,
    wait_until_still,
)
from tests.system.victims import Victims

pytestmark = pytest.mark.ray


def kill_during_a_call(actor: psutil.Process, run_dir: Path) -> None:
    """Kills the only actor of its role in the middle of a call: stops it until the whole run waits for its answer."""
    actor.suspend()
    wait_until_still(run_dir)
    actor.kill()


def kill_one_after_another(roles: tuple[str, str, str], victims: Victims, run_dir: Path) -> None:
    """Kills an actor of the first and of the second role in the middle of a call, and then a process of the third.

    Between two deaths a round is trained, which needs the actor that died before. The third dies when there is a
    checkpoint to go back to.
    """
    *in_a_call, last = roles
    for role in in_a_call:
        rounds = len(records_of(run_dir, "round")) + 1
        victim = victims.find(role)
        wait_until(lambda rounds=rounds: len(records_of(run_dir, "round")) >= rounds, f"round {rounds}")
        kill_during_a_call(victim, run_dir)
    victim = victims.find(last)  # before the wait: the rounds that are left may take less time than looking for it
    wait_for_rounds(run_dir, max(3, len(records_of(run_dir, "round")) + 1))
    victim.kill()


@pytest.mark.slow
def test_a_rollout_actor_a_teacher_actor_and_a_learner_rank_die(chain_teacher, whole, victims, tmp_path) -> None:
    """Ray restarts the actors, in the middle of a call, and the calls are repeated. Ray Train restarts the ranks from
    the last checkpoint, and the queue gives them the same rounds again. The losses are the same."""
    run_dir, roles = tmp_path / "run", ("rollout", "teacher", "learner")
    config = run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})
    train_here(config, meanwhile=lambda: kill_one_after_another(roles, victims, run_dir))
    assert assert_sound(run_dir)["learner_restart"] == 1
    assert losses(run_dir) == losses(whole)
    assert [r["role"] for r in records_of(run_dir, "actor_death")] == ["rollout", "teacher"]


@pytest.mark.slow
def test_the_queue_dies(chain_teacher, whole, victims, tmp_path) -> None:
    """The run goes back to its last checkpoint with a new queue and new ranks; the other actors stay."""
    run_dir = tmp_path / "run"

    def kill() -> None:
        wait_for_rounds(run_dir, 1)
        actors = {(role, p.pid) for role, p in victims.all() if role in ("rollout", "teacher")}
        victims.kill("queue")
        wait_for_rounds(run_dir, 3)
        assert actors <= {(role, p.pid) for role, p in victims.all()}

    train_here(run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2}), meanwhile=kill)
    assert assert_sound(run_dir)["queue_death"] == 1
    assert losses(run_dir) == losses(whole)


@pytest.mark.slow
def test_a_node_dies(cluster, chain_teacher, tmp_path) -> None:
    """With the actors, perhaps ranks, and the samples on it. The rest of the cluster finishes the run."""
    node = start_node(cluster, num_cpus=8)
    run_dir = tmp_path / "run"
    more = {"rollout": {"actors": 3}, "teacher": {"actors": 3}}
    with running(run_config(chain_teacher, run_dir, **more, evaluation={"final_problems": 0}), held_after=1) as process:
        wait_for_rounds(run_dir, 1, process)
        cluster.remove_node(node, allow_graceful=False)
        let_go(run_dir)
        assert process.wait(timeout=PATIENCE) == 0
    kinds = assert_sound(run_dir)
    assert kinds["actor_death"] + kinds["learner_restart"] >= 1, "no process of the run was on the node"


@pytest.mark.slow
def test_actors_are_added_and_removed_and_the_last_one_dies(ray_cluster, chain_teacher, victims, tmp_path) -> None:
    run_dir, rounds = tmp_path / "run", 5000
    config = run_config(
        chain_teacher,
        run_dir,
        run={"rounds": rounds},
        learner={"workers": 1},
        checkpoint={"every_rounds": 10},
        evaluation={"final_problems": 0},
        resources={"actor_restarts": 0},
    )

    def serving() -> dict[str, int]:
        latest = records_of(run_dir, "round")[-1]
        return {role: latest[f"{role}_actors"] for role in ("rollout", "teacher")}

    def processes() -> dict[str, int]:
        alive = Counter(role for role, _ in victims.all())
        return {role: alive[role] for role in ("rollout", "teacher")}

    def wait_for(count: Callable[[], dict[str, int]], **wanted: int) -> None:
        wait_until(lambda: count() == wanted, f"{wanted}")

    with pytest.raises(OpdlmError, match="holds no run"):
        request_scale(run_dir, {"rollout": 2}, 1)
    with running(config) as process:
        wait_for_rounds(run_dir, 1, process)
        assert request_scale(run_dir, {"rollout": 3, "teacher": 2}, PATIENCE) == {"rollout": [1, 3], "teacher": [1, 2]}
        wait_for(serving, rollout=3, teacher=2)
        with pytest.raises(
            OpdlmError, match=r"opdlm scale: the run asks for 42 CPUs \(rollout 40 x 1 \+ teacher 1 x 1"
        ):
            request_scale(run_dir, {"rollout": 40, "teacher": 1}, PATIENCE)
        assert request_scale(run_dir, {"rollout": 1}, PATIENCE) == {"rollout": [3, 1]}
        wait_for(serving, rollout=1, teacher=2)
        wait_for(processes, rollout=1, teacher=2)
        assert not records_of(run_dir, "actor_death"), "an actor that is removed on request did not die"
        victims.kill("rollout")
        assert process.wait(timeout=PATIENCE) == 2, (
            "with resources.actor_restarts 0, the last rollout actor is gone for good"
        )
    ledger = read_ledger(read_records(run_dir), PROMPTS_PER_ROUND, rounds * PROMPTS_PER_ROUND)
    assert (ledger.lost, ledger.twice) == ([], [])
    assert [r["role"] for r in records_of(run_dir, "actor_death")] == ["rollout"]
    trained = records_of(run_dir, "round")[-1]["round"]
    assert latest_checkpoint(run_dir / "checkpoints").rounds == trained, "everything that was trained is saved"
