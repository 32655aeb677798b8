"""Whichever loop ends first, the others end with it. `pytest tests/deploy/run/test_ending.py`"""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import ActorDiedError

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.errors import OpdlmError
from tests.fakes.actors import ROUNDS, FakeRun, N, Rollout, Teacher
from tests.patience import PATIENCE
from tests.system.full_disk import no_file_above


def test_a_failing_role_ends_the_run_with_its_error(tmp_path) -> None:
    async def scenario() -> FakeRun:
        run = FakeRun(tmp_path, 1, Rollout(), Teacher(fail_at=2 * N, times=99))
        message = f"sample {2 * N} failed 3 times .resources.sample_attempts.: out of memory"
        with pytest.raises(OpdlmError, match=message):
            await run.run()
        return run

    assert len(asyncio.run(scenario()).trained) <= 2


@pytest.mark.parametrize("queue_dies", [False, True])
def test_a_learner_that_hangs_after_another_loop_has_failed_is_not_waited_for(tmp_path, queue_dies, caplog) -> None:
    """Every teacher call fails. The learner is told to stop, but neither ends nor reports anything."""
    hangs = threading.Event()

    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher(fail_at=0, times=10**9), timeout_seconds=6)

        def learn() -> None:
            run.ask(run.queue.publish(0, ["pack"], 8))
            hangs.wait(PATIENCE)

        async def dead(*_: object) -> None:
            raise ActorDiedError

        async def stop() -> None:
            if queue_dies:
                run.queue.take_events = dead
            await ReplayQueueActor.request_stop(run.queue)

        run.queue.request_stop = stop
        with pytest.raises(OpdlmError, match="sample 0 failed 3 times"):
            await run.run(learn)

    try:
        asyncio.run(scenario())
    finally:
        hangs.set()
    assert "the run ends without a last checkpoint: learner: it " in caplog.text


def test_a_failing_learner_ends_the_run_with_its_error(tmp_path) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher())

        def broken() -> None:
            raise RuntimeError("the worker group is broken")

        with pytest.raises(RuntimeError, match="the worker group is broken"):
            await run.run(broken)

    asyncio.run(scenario())


def test_a_stop_does_not_wait_for_what_is_being_decoded(tmp_path) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(seconds=3600), Teacher())
        running = asyncio.create_task(run.run())
        while not run.pushed:
            await asyncio.sleep(0.01)
        await run.loops.stop()
        await asyncio.wait_for(running, timeout=PATIENCE)
        assert run.trained == []

    asyncio.run(scenario())


def test_metrics_that_cannot_be_written_end_the_run_without_blocking_the_learner(tmp_path) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher())

        def learn() -> None:
            run.ask(run.queue.publish(0, ["pack"], 8))
            run.ask(run.queue.take_round(0))
            run.ask(run.queue.tell([{"kind": "step", "round": 0, "step": 1, "note": "x" * 200}]))
            run.ask(run.queue.events_written())  # what the learner waits for before it saves
            assert run.ask(run.queue.take_round(1)) is None
            run.trained.append([])

        message = r"metrics.jsonl: File too large; .* with a checkpoint if there is room for it; .* --resume"
        with no_file_above(100), pytest.raises(OpdlmError, match=message):
            await run.run(learn)
        run.records.close()
        assert run.trained, "the learner did not come to its end"

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [0, 3600])
def test_training_that_ends_early_still_pushes_its_last_weights(tmp_path, seconds) -> None:
    """So that they can be evaluated. What is being decoded then is not waited for."""
    finished = []

    async def scenario() -> None:
        rollout = Rollout()
        run = FakeRun(tmp_path, 1, rollout, Teacher())

        async def on_weights(handle) -> None:
            run.pushed.append(handle.version)
            if handle.version == 2:
                rollout.seconds = seconds
                assert await run.loops.finish()

        def learn() -> None:
            run.learn()
            finished.append(run.ask(run.queue.ends_early()))

        run.loops.on_weights = on_weights
        await run.run(learn)
        assert 2 <= len(run.trained) <= 3, "the round that was in training is finished"
        assert run.pushed == list(range(len(run.trained) + 1))

    asyncio.run(scenario())
    assert finished == [True]


@pytest.mark.parametrize("first", ["stop", "time"])
def test_an_end_that_was_asked_for_stays_what_it_was(tmp_path, first) -> None:
    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher())
        loops = run.loops
        await (loops.stop() if first == "stop" else loops.stop_after_round(ROUNDS))
        assert not await loops.finish(), "some rank may have asked already whether the run is finished"
        await run.run()
        assert not await run.queue.ends_early()
        assert len(run.trained) == (0 if first == "stop" else 1)

    asyncio.run(scenario())
