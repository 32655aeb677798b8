"""The speed of asynchronous rounds and the guarantees that they keep, in simulated time.

The loops, the pools and the queue are the real ones. The time of a round is exact: see `tests/fakes/virtual_time.py`.
Run it with `pytest tests/deploy/run/test_async_rounds.py`.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayError

from tests.fakes import virtual_time
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages

pytestmark = pytest.mark.usefixtures("learner_as_a_coroutine")

POOLS = [(1, 1), (2, 2), (4, 2)]
"""Pairs of (rollout actors, teacher actors)."""


def seconds_per_round(shape: Shape, stages: Stages) -> float:
    async def scenario(folder: str) -> float:
        run = SimulatedRun(Path(folder), shape, stages)
        await run.run()
        return run.seconds_per_round()

    with tempfile.TemporaryDirectory() as folder:
        return virtual_time.run(scenario(folder))


def lower_bound(stages: Stages, staleness: int, n: int, rollouts: int, teachers: int) -> float:
    """The least possible seconds per round.

    A role does one thing at a time, and round r needs the weights of round r - staleness. A rollout actor does not
    decode while it loads weights. A sample is scored as soon as it is decoded.
    """
    made = made_after(stages, n, rollouts, teachers)
    in_turn = (made + stages.train + stages.push) / (staleness + 1)
    return max(stages.decode + stages.push, stages.score, stages.train, in_turn)


def made_after(stages: Stages, n: int, rollouts: int, teachers: int) -> float:
    """Least seconds until a round is decoded and scored.

    The actors end their last samples at the same time, and these are then scored; the first ones are decoded before
    anything is scored.
    """
    decode, score = stages.decode * rollouts / n, stages.score * teachers / n
    return max(stages.decode + math.ceil(rollouts / teachers) * score, stages.score + decode)


@pytest.mark.parametrize(("rollouts", "teachers"), POOLS)
@pytest.mark.parametrize("stages", [Stages(10, 3, 5, 0.5), Stages(1, 1, 1, 1)])
def test_strictly_on_policy_samples_are_scored_while_others_are_decoded(stages, rollouts, teachers) -> None:
    """Little but the last samples of a round is scored after its decoding."""
    n = 16
    took = seconds_per_round(Shape(0, 12, n, rollouts, teachers), stages)
    least = made_after(stages, n, rollouts, teachers) + stages.train + stages.push
    assert least - 1e-6 <= took <= min(1.1 * least, stages.total)


@pytest.mark.parametrize(("rollouts", "teachers"), POOLS)
@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("stages", [Stages(10, 3, 5, 0.5), Stages(5, 10, 3, 0.5), Stages(3, 5, 10, 0.5)])
def test_with_overlap_a_round_takes_as_long_as_its_slowest_stage(stages, staleness, rollouts, teachers) -> None:
    took = seconds_per_round(Shape(staleness, 36, 16, rollouts, teachers), stages)
    assert 0.95 * 10 <= took <= 1.1 * 10


@pytest.mark.parametrize(("rollouts", "teachers"), POOLS)
def test_equal_stages_keep_all_roles_busy_at_a_staleness_of_one(rollouts, teachers) -> None:
    """Samples leave one by one, so scoring overlaps the decoding of its own round."""
    assert seconds_per_round(Shape(1, 36, 32, rollouts, teachers), Stages(1, 1, 1, 0.05)) <= 1.1 * 1.05


@pytest.mark.parametrize(("rollouts", "teachers"), POOLS)
def test_a_push_waits_for_decoding_or_overlaps_it(rollouts, teachers) -> None:
    slow_push, n = Stages(10, 3, 5, 3), 16
    for staleness in (1, 2):
        finish, keep_on = (
            seconds_per_round(Shape(staleness, 36, n, rollouts, teachers, (("on_new_weights", what),)), slow_push)
            for what in ("finish", "continue")
        )
        assert finish == pytest.approx(13)
        assert keep_on == pytest.approx(10)


@given(
    durations=st.tuples(*[st.floats(0.1, 10)] * 3),
    push=st.floats(0.001, 0.1),
    staleness=st.integers(0, 3),
    pools=st.sampled_from(POOLS),
)
@settings(max_examples=40)
def test_a_round_takes_as_long_as_the_lower_bound(durations, push, staleness, pools) -> None:
    stages = Stages(*durations, push * max(durations))
    # The steady state repeats every staleness + 1 rounds, so the 24 rounds that are measured are whole repeats.
    took = seconds_per_round(Shape(staleness, 48, 8, *pools), stages)
    best = lower_bound(stages, staleness, 8, *pools)
    assert 0.98 * best <= took <= 1.01 * best


FAULTS = st.lists(st.sampled_from(["none", "none", "error", "death"]), max_size=30)
DEATHS = st.lists(st.sampled_from(["nowhere", "nowhere", "taken", "trained", "published"]), max_size=12)


@given(
    n=st.integers(1, 6),
    rounds=st.integers(1, 6),
    staleness=st.integers(0, 3),
    pools=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    every=st.integers(1, 3),
    on_new_weights=st.sampled_from(["finish", "continue"]),
    faults=FAULTS,
    deaths=DEATHS,
    stops=st.lists(st.floats(0, 30), max_size=2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120)
def test_every_sample_is_trained_once_whatever_dies(
    n, rounds, staleness, pools, every, on_new_weights, faults, deaths, stops, seed
) -> None:
    """Calls fail and are repeated, actors die, the learner goes back to its checkpoint, the run stops and resumes.

    Each sample is trained once, in its round, no more slots are used than there are (the fakes check this at every
    decode and every train), and no weights are older than allowed.
    """
    remaining, learner_dies, chance = iter(faults), iter(deaths), random.Random(seed)
    trained: dict[int, list[int]] = {}
    decoded: list[tuple[int, int]] = []

    async def life(folder: str, first_round: int, stop_at: float | None) -> int:
        dead: set[str] = set()  # the last actor of a pool never dies

        def fault(name: str) -> None:
            what, role = next(remaining, "none"), name.split("-")[0]
            if what == "death" and len([d for d in dead if d.startswith(role)]) < pools[role == "teacher"] - 1:
                dead.add(name)
                raise RayActorError
            if what != "none":
                raise RayError("the worker ran out of memory")

        overrides = (("on_new_weights", on_new_weights),)
        shape = Shape(staleness, rounds, n, *pools, overrides, len(faults) + 1, first_round, every)
        stages = Stages(2.0, 1.0, 1.5, 0.3)
        run = SimulatedRun(
            Path(folder), shape, stages, fault, lambda: chance.choice([0.0, 0.1, 1.0, 5.0]), learner_dies
        )

        async def stop() -> None:
            await asyncio.sleep(stop_at)
            await run.loops.stop()

        stopping = asyncio.ensure_future(stop()) if stop_at is not None else None
        await run.run()
        if stopping is not None:
            stopping.cancel()
        assert not trained.keys() & run.trained.keys(), "a resumed run trained a round again"
        trained.update(run.trained)
        decoded.extend(run.decoded)
        return run.committed

    done = 0
    for stop_at in [*stops, None]:
        with tempfile.TemporaryDirectory() as folder:
            done = virtual_time.run(life(folder, done, stop_at))
    assert done == rounds
    assert trained == {r: list(range(r * n, (r + 1) * n)) for r in range(rounds)}
    assert all(0 <= index // n - version <= staleness for index, version in decoded)
