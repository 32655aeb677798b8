"""The coordinator's loops with fakes instead of Ray. `pytest tests/deploy/run/test_loops.py`

The queue is the real one; actors and learner are coroutines that take as long as a test wants.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfDiskError, RayError, RayTaskError

from opdlm.actors.pool import ActorPool
from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.batches import in_groups
from opdlm.common.config import config_from_dict
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.errors import OpdlmError
from opdlm.common.retry import StoreWait
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.sources import OnPolicySource, Scoring
from tests.system.full_disk import no_file_above

N, ROUNDS = 4, 5


class Remote:
    """An actor handle over an object: `handle.method.remote(...)` gives an awaitable, or several for `num_returns`."""

    def __init__(self, target: object, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str):
        return _Method(getattr(self._target, name), self._loop)


class _Method:
    def __init__(self, function, loop: asyncio.AbstractEventLoop, outputs: int = 1) -> None:
        self._function, self._loop, self._outputs = function, loop, outputs

    def options(self, num_returns: int) -> _Method:
        return _Method(self._function, self._loop, num_returns)

    def remote(self, *arguments):
        call = asyncio.ensure_future(self._function(*arguments), loop=self._loop)
        if self._outputs == 1:
            return call
        parts = [asyncio.ensure_future(_part(call, i), loop=self._loop) for i in range(self._outputs)]
        for part in parts:  # of a call that failed only the last is asked, which asyncio would complain of
            part.add_done_callback(lambda part: part.cancelled() or part.exception())
        return parts


async def _part(call, i: int):
    return (await call)[i]


class Rollout:
    """Decodes nothing; records versions and indices."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.version, self.decoded, self.seconds = -1, [], seconds

    async def load_weights(self, handle: WeightHandle) -> float:
        assert handle.version >= self.version, "a version went backwards"
        self.version = handle.version
        return 0.0

    async def decode(self, requests, handle, settings, batch_size):
        await asyncio.sleep(self.seconds)
        self.decoded += [(r.index, self.version) for r in requests]
        return [r.index for r in requests], DecodeStats(self.version, len(requests), 1, 1, 1, 1, 0.1)


class Teacher:
    """Scores nothing; fails `times` times at one sample."""

    def __init__(self, fail_at: int | None = None, times: int = 0, error: Exception | None = None) -> None:
        self.fail_at, self.times, self.error = fail_at, times, error or RayError("out of memory")

    async def score(self, decoded, per_reference):
        indices = await decoded
        if self.fail_at in indices and self.times > 0:
            self.times -= 1
            raise self.error
        return (*in_groups(indices, per_reference), ScoreStats(1, 1, 0.1, 1, ((1, 1),) * len(indices)))


class Setup:
    """One run's parts, wired as `train_job` wires them."""

    def __init__(self, folder: Path, staleness: int, rollout: Rollout, teacher: Teacher) -> None:
        loop = asyncio.get_running_loop()
        self.loop = loop
        self.queue = ReplayQueueActor(N, staleness, N * ROUNDS, 0)
        self.trained: list[list[int]] = []
        pools = [ActorPool({n: Remote(a, loop)}, 30, 0) for n, a in (("rollout-0", rollout), ("teacher-0", teacher))]
        config = config_from_dict(
            {
                "model": {"teacher": "t"},
                "data": {"path": "p"},
                "rollout": {"prompts_per_round": N},
                "learner": {"batch_size": N},
                "queue": {"max_staleness": staleness},
            }
        )
        order = PromptOrder([Prompt(str(i), np.array([1])) for i in range(N * ROUNDS)], 0, 1)
        view = type("View", (), {"show": lambda self, record: None})()
        self.hooked: list[int] = []
        telemetry, roles = RunRecords(folder, view), Roles(Remote(self.queue, loop), *pools)
        source = OnPolicySource(config, pools[0], Scoring(pools[1], telemetry, 3), order)
        self.coordinator = Loops(config, roles, source, telemetry, self._hook)

    async def _hook(self, handle: WeightHandle) -> None:
        self.hooked.append(handle.version)

    def learn(self) -> None:
        """A learner in its thread: take, train, publish."""

        def ask(coroutine):
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=30)

        ask(self.queue.publish(0, ["pack"], 8))
        for round_ in range(ROUNDS):
            taken = ask(self.queue.take_round(round_))
            if taken is None:
                return
            self.trained.append([ask(_value(s)) for s in taken[0]])
            ask(self.queue.publish(round_ + 1, ["pack"], 8))


async def _value(sample):
    return (await sample.group)[sample.place]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_sample_once_in_order_and_fresh_enough(tmp_path, staleness) -> None:
    async def scenario() -> None:
        rollout = Rollout()
        setup = Setup(tmp_path, staleness, rollout, Teacher())
        await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        assert [i for indices in setup.trained for i in indices] == list(range(N * ROUNDS))
        assert all(0 <= i // N - version <= staleness for i, version in rollout.decoded)
        assert setup.hooked[0] == 0
        assert setup.hooked == sorted(set(setup.hooked))
        assert rollout.version == ROUNDS, "the last weights must reach the rollout actors too"

    asyncio.run(scenario())


def test_a_failing_role_ends_the_run_with_its_error(tmp_path) -> None:
    async def scenario() -> Setup:
        setup = Setup(tmp_path, 1, Rollout(), Teacher(fail_at=2 * N, times=99))
        message = f"samples {2 * N} to {3 * N - 1} failed 3 times .resources.sample_attempts.: out of memory"
        with pytest.raises(OpdlmError, match=message):
            await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        return setup

    assert len(asyncio.run(scenario()).trained) <= 2


def test_a_score_that_fails_is_tried_again_and_told(tmp_path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=2))
        await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        assert [i for indices in setup.trained for i in indices] == list(range(N * ROUNDS))
        failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
        assert [(f["samples"], f["attempt"], f["reason"]) for f in failures] == [
            (N, a, "out of memory") for a in (1, 2)
        ]

    asyncio.run(scenario())


@pytest.mark.parametrize("staleness", [0, 2])
def test_samples_whose_data_died_are_decoded_and_scored_again(tmp_path, staleness) -> None:
    """Also in the last round, when nothing else is left to decode."""

    async def scenario() -> None:
        rollout = Rollout()
        setup = Setup(tmp_path, staleness, rollout, Teacher())

        def learn() -> None:
            def ask(coroutine):
                return asyncio.run_coroutine_threadsafe(coroutine, setup.loop).result(timeout=30)

            ask(setup.queue.publish(0, ["pack"], 8))
            for round_ in range(ROUNDS):
                samples, _ = ask(setup.queue.take_round(round_))
                if round_ in (1, ROUNDS - 1):
                    first, again = samples[0], ask(setup.queue.replace(round_ * N, samples[0]))
                    assert again.group is not first.group
                    assert ask(_value(again)) == round_ * N
                ask(setup.queue.publish(round_ + 1, ["pack"], 8))

        await asyncio.wait_for(setup.coordinator.run(learn), timeout=30)
        decoded = [index for index, _ in rollout.decoded]
        assert sorted(decoded) == sorted([*range(N * ROUNDS), N, (ROUNDS - 1) * N])

    asyncio.run(scenario())


def test_a_learner_that_hangs_is_named(tmp_path, monkeypatch) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher())
        hanging = threading.Event()
        config = setup.coordinator.config
        patience = config.resources.model_copy(update={"call_timeout_seconds": 0.2})
        setup.coordinator.config = config.model_copy(update={"resources": patience})
        try:
            with pytest.raises(OpdlmError, match=r"learner: it neither trains nor waits for samples since 0\.2 s"):
                await asyncio.wait_for(setup.coordinator.run(lambda: hanging.wait(60)), timeout=30)
        finally:
            hanging.set()

    asyncio.run(scenario())


def store_full() -> RayTaskError:
    """As it arrives from an actor whose outputs found no room."""
    return RayTaskError("score", "Traceback ...", OutOfDiskError("Local disk is full"))


def test_a_full_object_store_uses_up_no_attempts(tmp_path, monkeypatch) -> None:
    waits: list[float] = []

    class Impatient(StoreWait):
        def __init__(self, limit_seconds: float) -> None:
            super().__init__(limit_seconds, first_seconds=0.01)

        def pause(self, what: str) -> float:
            waits.append(super().pause(what))
            return waits[-1]

    monkeypatch.setattr("opdlm.deploy.run.loops.StoreWait", Impatient)

    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=5, error=store_full()))
        await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        assert [i for indices in setup.trained for i in indices] == list(range(N * ROUNDS))

    asyncio.run(scenario())
    assert waits == [0.01, 0.02, 0.04, 0.08, 0.16]
    failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
    assert [(f["samples"], f["attempt"]) for f in failures] == [(N, 1)] * 5


def test_a_store_that_stays_full_ends_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("opdlm.deploy.run.loops.StoreWait", lambda _: StoreWait(0.05, first_seconds=0.01))

    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher(fail_at=N, times=10**9, error=store_full()))
        message = rf"samples {N} to {2 * N - 1}: Ray's object store and its disk were full for 0.05 s"
        with pytest.raises(OpdlmError, match=message):
            await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        assert setup.trained == [list(range(N))]

    asyncio.run(scenario())


@pytest.mark.parametrize("queue_dies", [False, True])
def test_a_learner_that_hangs_after_another_loop_has_failed_is_not_waited_for(tmp_path, queue_dies, caplog) -> None:
    """The last teacher is gone; the learner, told to stop, neither ends nor is heard of."""
    hangs = threading.Event()

    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher(fail_at=0, times=10**9))
        coordinator = setup.coordinator
        resources = coordinator.config.resources.model_copy(update={"call_timeout_seconds": 0.2})
        coordinator.config = coordinator.config.model_copy(update={"resources": resources})

        def learn() -> None:
            asyncio.run_coroutine_threadsafe(setup.queue.publish(0, ["pack"], 8), setup.loop).result(timeout=30)
            hangs.wait(60)

        async def dead(*_: object) -> None:
            raise ActorDiedError

        async def stop() -> None:
            if queue_dies:
                setup.queue.drain_events = dead
            await ReplayQueueActor.request_stop(setup.queue)

        setup.queue.request_stop = stop
        with pytest.raises(OpdlmError, match="samples 0 to 3 failed 3 times"):
            await asyncio.wait_for(coordinator.run(learn), timeout=30)

    try:
        asyncio.run(scenario())
    finally:
        hangs.set()
    assert "the run ends without a last checkpoint: learner: it " in caplog.text


def test_a_push_that_fails_once_is_tried_again_and_one_that_always_fails_ends_the_run(tmp_path) -> None:
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
        setup = Setup(tmp_path / str(times), 0, Forgetful(times), Teacher())
        await asyncio.wait_for(setup.coordinator.run(setup.learn), timeout=30)
        return setup.trained

    for times in (2, 3):
        (tmp_path / str(times)).mkdir()
    assert len(asyncio.run(scenario(2))) == ROUNDS
    failures = [r for r in read_records(tmp_path / "2") if r["kind"] == "failure"]
    assert [(f["samples"], f["attempt"]) for f in failures] == [(0, 1), (0, 2)]
    with pytest.raises(
        OpdlmError, match=r"weights of version 1 failed to load 3 times .resources.sample_attempts.: CUDA"
    ):
        asyncio.run(scenario(3))


def test_a_failing_learner_ends_the_run_with_its_error(tmp_path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher())

        def broken() -> None:
            raise RuntimeError("the worker group is broken")

        with pytest.raises(RuntimeError, match="the worker group is broken"):
            await asyncio.wait_for(setup.coordinator.run(broken), timeout=30)

    asyncio.run(scenario())


def test_a_stop_does_not_wait_for_what_is_being_decoded(tmp_path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(seconds=3600), Teacher())
        running = asyncio.create_task(setup.coordinator.run(setup.learn))
        while not setup.hooked:
            await asyncio.sleep(0.01)
        await setup.coordinator.stop()
        await asyncio.wait_for(running, timeout=30)
        assert setup.trained == []

    asyncio.run(scenario())


def test_metrics_that_cannot_be_written_end_the_run_and_hold_up_nobody(tmp_path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path, 0, Rollout(), Teacher())

        def ask(coroutine):
            return asyncio.run_coroutine_threadsafe(coroutine, setup.loop).result(timeout=30)

        def learn() -> None:
            ask(setup.queue.publish(0, ["pack"], 8))
            ask(setup.queue.take_round(0))
            ask(setup.queue.tell([{"kind": "step", "round": 0, "step": 1, "note": "x" * 200}]))
            ask(setup.queue.events_written())  # what the learner waits for before it saves
            assert ask(setup.queue.take_round(1)) is None
            setup.trained.append([])

        message = r"metrics.jsonl: File too large; .* with a checkpoint if there is room for it; .* --resume"
        with no_file_above(100), pytest.raises(OpdlmError, match=message):
            await asyncio.wait_for(setup.coordinator.run(learn), timeout=30)
        setup.coordinator.telemetry.close()
        assert setup.trained, "the learner did not come to its end"

    asyncio.run(scenario())
