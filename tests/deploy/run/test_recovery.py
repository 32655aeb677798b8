"""Failed calls, lost samples, a full object store, a silent learner. `pytest tests/deploy/run/test_recovery.py`"""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import OutOfDiskError, RayTaskError

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.config import config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.common.retry import StoreWait
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run import recovery
from opdlm.learner.group import LearnerBehind
from tests.fakes.actors import ROUNDS, FakeRun, N, Rollout, Teacher, value_of_sample
from tests.patience import PATIENCE


def test_a_score_that_fails_is_repeated_and_recorded(tmp_path) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=2))
        await run.run()
        assert [i for indices in run.trained for i in indices] == list(range(N * ROUNDS))
        failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
        assert [(f["samples"], f["attempt"], f["reason"]) for f in failures] == [
            (N, a, "out of memory") for a in (1, 2)
        ]

    asyncio.run(scenario())


@pytest.mark.parametrize("staleness", [0, 2])
def test_samples_whose_data_is_lost_are_decoded_and_scored_again(tmp_path, staleness) -> None:
    """This holds in the last round too, when nothing else is left to decode."""

    async def scenario() -> None:
        rollout = Rollout()
        run = FakeRun(tmp_path, staleness, rollout, Teacher())

        def learn() -> None:
            run.ask(run.queue.publish(0, ["pack"], 8))
            for round_ in range(ROUNDS):
                samples, _ = run.ask(run.queue.take_round(round_))
                if round_ in (1, ROUNDS - 1):
                    first, again = samples[0], run.ask(run.queue.remade_sample(round_ * N, samples[0]))
                    assert again.group is not first.group
                    assert run.ask(value_of_sample(again)) == round_ * N
                run.ask(run.queue.publish(round_ + 1, ["pack"], 8))

        await run.run(learn)
        decoded = [index for index, _ in rollout.decoded]
        assert sorted(decoded) == sorted([*range(N * ROUNDS), N, (ROUNDS - 1) * N])

    asyncio.run(scenario())


def test_a_learner_that_hangs_is_named(tmp_path) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher(), timeout_seconds=3)
        hanging = threading.Event()
        try:
            with pytest.raises(OpdlmError, match=r"learner: it has not trained or waited for samples for 3 s"):
                await run.run(lambda: hanging.wait(PATIENCE))
        finally:
            hanging.set()

    asyncio.run(scenario())


def store_full() -> RayTaskError:
    """The error of a call whose outputs found no room in the object store, as the driver gets it."""
    return RayTaskError("score", "Traceback ...", OutOfDiskError("Local disk is full"))


def test_a_full_object_store_uses_up_no_attempts(tmp_path, monkeypatch) -> None:
    waits: list[float] = []

    class Impatient(StoreWait):
        def __init__(self, limit_seconds: float) -> None:
            super().__init__(limit_seconds, first_seconds=0.01)

        def pause(self, what: str) -> float:
            waits.append(super().pause(what))
            return waits[-1]

    monkeypatch.setattr("opdlm.deploy.run.recovery.StoreWait", Impatient)

    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=5, error=store_full()))
        await run.run()
        assert [i for indices in run.trained for i in indices] == list(range(N * ROUNDS))

    asyncio.run(scenario())
    assert sorted(set(waits)) == [0.01, 0.02, 0.04, 0.08, 0.16]
    failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
    assert sum(f["samples"] for f in failures) == len(waits)
    assert {f["attempt"] for f in failures} == {1}


def test_a_store_that_stays_full_ends_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("opdlm.deploy.run.recovery.StoreWait", lambda _: StoreWait(0.05, first_seconds=0.01))

    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=10**9, error=store_full()))
        # Samples that share a call with this one fail with it, and which of them is out of time first is chance.
        message = rf"sample [{N}-{2 * N - 1}]: Ray's object store and its disk were full for 0.05 s"
        with pytest.raises(OpdlmError, match=message):
            await run.run()
        assert run.trained == [list(range(N))]

    asyncio.run(scenario())


def test_a_push_that_fails_is_repeated_and_one_that_fails_too_often_ends_the_run(tmp_path) -> None:
    class Forgetful(Rollout):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        async def load_weights(self, handle: WeightHandle) -> float:
            if handle.version == 1 and self.times:
                self.times -= 1
                raise RayTaskError("load_weights", "CUDA out of memory", RuntimeError("CUDA out of memory"))
            return await super().load_weights(handle)

    async def scenario(times: int) -> list[list[int]]:
        run = FakeRun(tmp_path / str(times), 0, Forgetful(times), Teacher())
        await run.run()
        return run.trained

    for times in (2, 3):
        (tmp_path / str(times)).mkdir()
    assert len(asyncio.run(scenario(2))) == ROUNDS
    failures = [r for r in read_records(tmp_path / "2") if r["kind"] == "failure"]
    assert [(f["samples"], f["attempt"]) for f in failures] == [(0, 1), (0, 2)]
    with pytest.raises(
        OpdlmError, match=r"loading weights of version 1 failed 3 times .resources.sample_attempts.: CUDA"
    ):
        asyncio.run(scenario(3))


@pytest.mark.parametrize("times", [1, 3])
def test_a_learner_behind_its_queue_goes_on_with_a_new_queue_from_the_older_checkpoint(
    tmp_path, monkeypatch, times
) -> None:
    """The newest checkpoint is damaged, and the queue has let go of the samples since the one before it."""
    for rounds in (2, 4):
        save_checkpoint(tmp_path / "checkpoints", {"rounds": rounds}, lambda folder: None, keep=9)
    (tmp_path / "checkpoints" / "round-000004" / "state.json").unlink()
    started, stopped, forgotten = [], [], []
    monkeypatch.setattr(recovery, "start_queue", lambda *limits, name: started.append((limits, name)) or name)
    monkeypatch.setattr(recovery, "stop_actors", stopped.extend)

    class Records:
        def went_back(self, reason: str) -> None:
            told.append(reason)

    class Pool:
        async def broadcast(self, method: str) -> None:
            forgotten.append(method)

    told: list[str] = []
    raw = {"model": {"teacher": "t"}, "data": {"path": "p"}, "resources": {"actor_restarts": 2}}
    config = config_from_dict(raw | {"run": {"dir": str(tmp_path)}, "rollout": {"prompts_per_round": 8}})
    roles = Roles("first queue", Pool(), Pool())
    left = [LearnerBehind("the checkpoint of round 4 is damaged")] * times

    async def run_loops() -> None:
        if left:
            raise left.pop()

    survive = recovery.survive_queue_deaths(config, roles, 48, Records(), run_loops, lambda: False)
    if times > 2:
        message = "checkpoints: damaged more often than resources.actor_restarts 2 allows: the checkpoint of round 4"
        with pytest.raises(OpdlmError, match=message):
            asyncio.run(survive)
        return
    asyncio.run(survive)
    assert started == [((8, 0, 48, 2, 1), "replay-queue-2")]
    assert (stopped, roles.queue, forgotten) == (["first queue"], "replay-queue-2", ["forget_weights"])
    assert told == ["the checkpoint of round 4 is damaged"]
