"""What the queue refuses as too stale is made again, and every sample keeps its own weight version.

The loops, the pools and the queue are the real ones, in virtual time. `pytest tests/deploy/run/test_stale_samples.py`
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from opdlm.common.errors import OpdlmError
from opdlm.common.samples import SampleRef, sample_refs
from opdlm.common.types import WeightHandle
from opdlm.deploy.observe.records import read_records
from tests.fakes import virtual_time
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages

pytestmark = pytest.mark.usefixtures("learner_as_a_coroutine")

N, ROUNDS, STALENESS = 4, 6, 1
EVERYTHING = {r: list(range(r * N, (r + 1) * N)) for r in range(ROUNDS)}


class Source:
    """Makes three samples in a second. `version_of(index, weights)`: which weights they say decoded them."""

    together = 3

    def __init__(self, version_of: Callable[[int, int], int]) -> None:
        self.version_of, self.calls = version_of, []

    async def room(self) -> int:
        return 3

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[SampleRef], list[int]]:
        indices = list(indices)
        self.calls.append(indices)
        await asyncio.sleep(1.0)
        group = asyncio.get_running_loop().create_future()
        group.set_result(indices)
        versions = [self.version_of(index, weights.version) for index in indices]
        return sample_refs([group], len(indices), [(1, 1)] * len(indices)), versions


def simulate(folder: Path, source: Source) -> SimulatedRun:
    """A run whose calls of three samples cross the borders of its rounds of four."""

    async def scenario() -> SimulatedRun:
        shape = Shape(STALENESS, ROUNDS, N)
        run = SimulatedRun(folder, shape, Stages(1.0, 1.0, 1.0, 0.1))
        run.loops.source = source
        await run.run()
        return run

    return virtual_time.run(scenario())


def test_a_call_across_two_rounds_keeps_the_version_of_each_sample(tmp_path) -> None:
    """As in a replay: each round was decoded with the weights before its own, so a call has samples of two versions.

    The older one is allowed for the earlier round and too old for the later one.
    """
    source = Source(lambda index, _: max(index // N - STALENESS, 0))
    run = simulate(tmp_path, source)
    assert run.trained == EVERYTHING
    assert any(indices[0] // N != indices[-1] // N for indices in source.calls)
    assert run.queue._queue.refused == {"duplicate": 0, "stale": 0}


def test_samples_that_are_refused_as_stale_are_made_again_and_counted(tmp_path) -> None:
    """Two samples of a call come with weights that are too old, once each. Only they are made again."""
    late = {9, 10, 17}

    def version_of(index: int, version: int) -> int:
        if index in late:
            late.remove(index)
            return index // N - STALENESS - 1
        return version

    source = Source(version_of)
    run = simulate(tmp_path, source)
    assert run.trained == EVERYTHING
    assert run.queue._queue.refused == {"duplicate": 0, "stale": 3}
    made = [index for indices in source.calls for index in indices]
    assert sorted(made) == sorted([*range(N * ROUNDS), 9, 10, 17])
    failures = [r for r in read_records(tmp_path) if r["kind"] == "failure"]
    assert sum(r["samples"] for r in failures) == 3
    assert all("too old for their rounds (queue.max_staleness)" in r["reason"] for r in failures)


def test_samples_that_stay_stale_end_the_run(tmp_path) -> None:
    """As from a source that ignores the weights: it would be asked for ever."""
    source = Source(lambda index, version: -1 if index == 9 else version)
    message = r"failed 3 times \(resources.sample_attempts\): 1 samples \(9\) were decoded with weights of version -1"
    with pytest.raises(OpdlmError, match=message):
        simulate(tmp_path, source)
