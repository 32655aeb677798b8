"""Published weights whose holder, a rank of the learner, has died. `pytest tests/deploy/run/test_lost_weights.py`

These tests use fakes instead of Ray; `tests/system/test_weight_transport.py` uses real processes.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import RayTaskError

from opdlm.common.errors import OpdlmError, WeightsLost
from opdlm.common.types import WeightHandle
from opdlm.deploy.observe.records import read_records
from tests.fakes.actors import ROUNDS, FakeRun, N, Rollout, Teacher, value_of_sample
from tests.patience import PATIENCE

LOST, AGAIN = ["reference of a dead rank"], ["reference of its successor"]


class Reader(Rollout):
    """Reads weights from their holder: when they are pushed, or, with `restarts`, with each request."""

    def __init__(self, restarts: bool) -> None:
        super().__init__()
        self.restarts = restarts
        self.found_lost = threading.Event()

    async def load_weights(self, handle: WeightHandle) -> float:
        if not self.restarts:
            self.read(handle)
        return await super().load_weights(handle)

    async def add(self, requests, handle: WeightHandle) -> None:
        if self.restarts:
            self.read(handle)
        await super().add(requests, handle)

    def read(self, handle: WeightHandle) -> None:
        """Reads weights as an actor does that does not hold the version yet; raises if their holder is dead."""
        if handle.pack == LOST:
            self.found_lost.set()
            lost = WeightsLost(f"weights of version {handle.version}: the owner has exited")
            raise RayTaskError("add", f"Traceback ...\n{lost}", lost).as_instanceof_cause()


def _learn(run: FakeRun, lost: int, found: threading.Event | None, comes_back: bool) -> None:
    """A learner that loses version `lost` once, and after its restart publishes it again only if it `comes_back`.

    It is restarted when the weights were `found` to be lost; at once, where they may be published again before.
    """

    ask = run.ask
    for version in range(ROUNDS + 1):
        if version:
            taken = ask(run.queue.take_round(version - 1))
            if taken is None:
                return
            run.trained.append([ask(value_of_sample(sample)) for sample in taken[0]])
        if version == lost:
            ask(run.queue.publish(version, LOST, 8))
            if found is not None:
                assert found.wait(PATIENCE)
            if not comes_back:
                continue
            ask(run.queue.publish(max(version - 1, 0), ["older"], 8))
        ask(run.queue.publish(version, AGAIN, 8))


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("lost", [0, 2, ROUNDS])
@pytest.mark.parametrize("staleness", [0, 1])
def test_lost_weights_are_loaded_when_the_learner_has_published_them_again(tmp_path, staleness, lost, restarts) -> None:
    async def scenario() -> None:
        rollout, is_read = Reader(restarts), lost < ROUNDS and staleness == 0
        run = FakeRun(tmp_path, staleness, rollout, Teacher())
        await run.run(lambda: _learn(run, lost, rollout.found_lost if is_read else None, True))
        assert [i for indices in run.trained for i in indices] == list(range(N * ROUNDS))
        assert sorted(index for index, _ in rollout.decoded) == list(range(N * ROUNDS))
        assert all(0 <= index // N - version <= staleness for index, version in rollout.decoded)

    asyncio.run(scenario())
    failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
    assert all("WeightsLost" in r["error"] for r in failures)
    if lost < ROUNDS and staleness == 0:
        assert failures


def test_an_evaluation_that_finds_its_weights_lost_is_repeated(tmp_path) -> None:
    async def scenario() -> None:
        reader, evaluated = Reader(True), []
        run = FakeRun(tmp_path, 0, reader, Teacher())

        async def evaluate(handle: WeightHandle) -> None:
            reader.read(handle)
            evaluated.append(handle.version)

        run.loops.on_weights = evaluate
        await run.run(lambda: _learn(run, 2, reader.found_lost, True))
        assert evaluated == list(range(ROUNDS + 1))

    asyncio.run(scenario())


def test_weights_that_are_not_published_again_end_the_run(tmp_path) -> None:
    async def scenario() -> None:
        reader = Reader(False)
        run = FakeRun(tmp_path, 0, reader, Teacher(), timeout_seconds=3)
        message = r"weights of version 2: the owner has exited; not published again within 3 s"
        with pytest.raises(OpdlmError, match=message):
            await run.run(lambda: _learn(run, 2, reader.found_lost, False))

    asyncio.run(scenario())
