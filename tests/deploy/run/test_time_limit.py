"""A run ends by itself after the round in which its time is over. `pytest tests/deploy/run/test_time_limit.py`"""

from __future__ import annotations

import asyncio

import pytest

from opdlm.deploy.run.time_limit import TimeLimit
from tests.fakes import virtual_time
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages

pytestmark = pytest.mark.usefixtures("learner_as_a_coroutine")

ROUNDS, STAGES = 6, Stages(30, 10, 26.75, 2)
"""A round takes a minute: its last sample is scored 31.25 s after its decoding began."""


def part(folder, minutes: float | None, staleness: int = 0, first_round: int = 0, stop_at: float | None = None):
    """A part of a run: the run, its time limit, and what the user reads of it. `stop_at`: seconds until a signal."""
    told: list[str] = []

    async def scenario() -> tuple[SimulatedRun, TimeLimit]:
        run = SimulatedRun(folder, Shape(staleness, ROUNDS, first_round=first_round), STAGES)
        limit = TimeLimit(minutes, asyncio.get_running_loop().time)
        watching = asyncio.create_task(limit.watch(run.loops, ROUNDS, told.append))
        running = asyncio.create_task(run.run())
        if stop_at is not None:
            await asyncio.sleep(stop_at)
            await run.loops.stop()
        await running
        watching.cancel()
        return run, limit

    return *virtual_time.run(scenario()), told


@pytest.mark.parametrize(
    ("minutes", "trained"),
    [(0.001, 1), (0.6, 1), (1.4, 2), (1.8, 2), (3.5, 4)],  # while it decodes, trains, decodes, trains, decodes
)
def test_the_round_in_which_the_time_is_over_is_finished_and_saved(tmp_path, minutes, trained) -> None:
    run, limit, told = part(tmp_path, minutes)
    assert list(run.trained) == list(range(trained))
    assert run.committed == trained
    assert limit.over
    what = f"round {trained} of {ROUNDS} is finished, then a checkpoint is written"
    assert told == [f"{minutes:g} minutes are over (run.max_minutes): {what}"]
    assert max(index for index, _ in run.decoded) < trained * 8, "nothing is decoded that nobody trains on"


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_parts_train_every_sample_once(tmp_path, staleness) -> None:
    first, trained, parts = 0, [], 0
    while first < ROUNDS:
        run, limit, _ = part(tmp_path, 1.9, staleness, first)
        trained += [index for samples in run.trained.values() for index in samples]
        first, parts = run.committed, parts + 1
        assert limit.over == (first < ROUNDS)
    assert trained == list(range(8 * ROUNDS))
    assert parts > 1


@pytest.mark.parametrize("minutes", [None, 5.5, 100])
def test_the_last_round_ends_the_run_anyway(tmp_path, minutes) -> None:
    run, limit, told = part(tmp_path, minutes)
    assert (len(run.trained), limit.over, told) == (ROUNDS, False, [])


def test_a_stop_by_a_signal_comes_first(tmp_path) -> None:
    run, limit, told = part(tmp_path, 1.5, stop_at=50)  # the first round is in training
    assert (len(run.trained), limit.over, told) == (1, False, [])
    run, limit, told = part(tmp_path, 0.2, stop_at=20)  # the time is over, and then a signal while it decodes
    assert (len(run.trained), limit.over, len(told)) == (0, True, 1)
