"""Every role of a run dies in turn, by SIGKILL, through real Ray; actors come and go. `pytest tests/system/test_deaths.py`

The driver's death is in `test_run.py`; all of them at random, for longer: `make chaos`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.deploy.cluster.scaling import request_scale
from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import read_records
from tests.system.runs import ROUNDS, losses, run_config, start, wait_for_rounds

pytestmark = pytest.mark.ray

N = 8
"""Prompts of a round in `run_config`."""


@contextlib.contextmanager
def running(config: OpdlmConfig) -> Iterator[subprocess.Popen]:
    """`opdlm train` in a process of its own, ended at the latest here."""
    process = start(config, resume=False)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def records_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_records(run_dir) if r["kind"] == kind]


def kill_at_work(actor: psutil.Process, run_dir: Path) -> None:
    """SIGKILL to the only actor of its role in the middle of a call: it is stopped until the whole run waits for it."""
    actor.suspend()
    wait_until_still(run_dir)
    actor.kill()


def wait_until_still(run_dir: Path) -> None:
    """Until nothing was recorded for a while: a stopped process is waited for."""
    records, still_since = -1, time.monotonic()
    while time.monotonic() - still_since < 5:
        if len(found := read_records(run_dir)) != records:
            records, still_since = len(found), time.monotonic()
        time.sleep(0.1)


def assert_sound(run_dir: Path) -> Counter[str]:
    """Every sample of the run was trained exactly once, no version fell; kinds of records and how many there are."""
    records = read_records(run_dir)
    ledger = read_ledger(records, N, ROUNDS * N)
    assert (ledger.trained, ledger.lost, ledger.twice) == (ROUNDS * N, [], [])
    versions = [r["weight_version"] for r in records if r["kind"] == "publish"]
    assert versions == sorted(versions)
    assert json.loads((run_dir / "report.json").read_text())["weight_version"] == ROUNDS
    return Counter(r["kind"] for r in records)


def test_a_rollout_actor_and_a_teacher_die(chain_teacher, whole, victims, tmp_path) -> None:
    """Mid-batch, mid-score: Ray restarts them, the calls are repeated, the losses are the same."""
    run_dir = tmp_path / "run"
    with running(run_config(chain_teacher, run_dir)) as process:
        for role in ("rollout", "teacher"):
            rounds = len(records_of(run_dir, "round")) + 1  # it takes the actor that died before to train one more
            victim = victims.find(role)
            wait_for_rounds(run_dir, rounds, process)
            kill_at_work(victim, run_dir)
        assert process.wait(timeout=400) == 0
    assert_sound(run_dir)
    assert losses(run_dir) == losses(whole)
    assert [r["role"] for r in records_of(run_dir, "actor_death")] == ["rollout", "teacher"]


def test_a_learner_rank_dies(chain_teacher, whole, victims, tmp_path) -> None:
    """Ray Train restarts the group from its last checkpoint, the queue hands out the same rounds again."""
    run_dir = tmp_path / "run"
    with running(run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})) as process:
        wait_for_rounds(run_dir, 3, process)
        victims.kill("learner")
        assert process.wait(timeout=400) == 0
    assert assert_sound(run_dir)["learner_restart"] == 1
    assert losses(run_dir) == losses(whole)


def test_the_queue_dies(chain_teacher, whole, victims, tmp_path) -> None:
    """The run goes back to its last checkpoint with a new queue and a new learner; the actors stay."""
    run_dir = tmp_path / "run"
    with running(run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})) as process:
        wait_for_rounds(run_dir, 1, process)
        actors = {(role, p.pid) for role, p in victims.all() if role in ("rollout", "teacher")}
        victims.kill("queue")
        wait_for_rounds(run_dir, 3, process)
        assert actors <= {(role, p.pid) for role, p in victims.all()}
        assert process.wait(timeout=400) == 0
    assert assert_sound(run_dir)["queue_death"] == 1
    assert losses(run_dir) == losses(whole)


def test_a_node_dies(cluster, chain_teacher, tmp_path) -> None:
    """Actors, perhaps ranks, and samples on it die together; what is left of the cluster does the rest."""
    node = cluster.add_node(num_cpus=8)
    run_dir = tmp_path / "run"
    more = {"rollout": {"actors": 3, "prompts_per_call": 4}, "teacher": {"actors": 3}}
    with running(run_config(chain_teacher, run_dir, **more, evaluation={"final_problems": 0})) as process:
        wait_for_rounds(run_dir, 1, process)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(timeout=500) == 0
    kinds = assert_sound(run_dir)
    assert kinds["actor_death"] + kinds["learner_restart"] >= 1, "nothing of the run was on the node"


def test_actors_are_added_and_taken_away_until_the_last_one_dies(ray_cluster, chain_teacher, victims, tmp_path) -> None:
    run_dir = tmp_path / "run"
    config = run_config(
        chain_teacher,
        run_dir,
        run={"rounds": 5000},
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

    def wait_until(count: Callable[[], dict[str, int]], **wanted: int) -> None:
        limit = time.monotonic() + 600
        while count() != wanted:
            assert time.monotonic() < limit, f"{count()} instead of {wanted}"
            time.sleep(0.2)

    with pytest.raises(OpdlmError, match="holds no run"):
        request_scale(run_dir, {"rollout": 2}, 1)
    with running(config) as process:
        wait_for_rounds(run_dir, 1, process)
        assert request_scale(run_dir, {"rollout": 3, "teacher": 2}, 300) == {"rollout": [1, 3], "teacher": [1, 2]}
        wait_until(serving, rollout=3, teacher=2)
        with pytest.raises(
            OpdlmError, match=r"opdlm scale: the run asks for 42 CPUs \(rollout 40 x 1 \+ teacher 1 x 1"
        ):
            request_scale(run_dir, {"rollout": 40, "teacher": 1}, 300)
        assert request_scale(run_dir, {"rollout": 1}, 300) == {"rollout": [3, 1]}
        wait_until(serving, rollout=1, teacher=2)
        wait_until(processes, rollout=1, teacher=2)
        assert not records_of(run_dir, "actor_death"), "going by request is no death"
        victims.kill("rollout")
        assert process.wait(timeout=300) == 2, "the last one is gone for good: resources.actor_restarts is 0"
    ledger = read_ledger(read_records(run_dir), N, 5000 * N)
    assert (ledger.lost, ledger.twice) == ([], [])
    assert [r["role"] for r in records_of(run_dir, "actor_death")] == ["rollout"]
    trained = records_of(run_dir, "round")[-1]["round"]
    assert latest_checkpoint(run_dir / "checkpoints").rounds == trained, "what was trained is saved"
