"""Fake actors: objects whose methods are coroutines, in place of Ray's actors, with the real queue, pools and loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ray.exceptions import RayError

from opdlm.actors.pool import ActorPool
from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.batches import in_groups
from opdlm.common.config import config_from_dict
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.types import DecodeStats, EndedSequence, RolloutRequest, StreamReport, WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.ending import run_together
from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.scoring import Scoring
from opdlm.deploy.run.sources import OnPolicySource
from tests.patience import PATIENCE

N, ROUNDS = 4, 5
"""Prompts per round, and rounds, of a `FakeRun`."""


class Remote:
    """An object as an actor handle: `handle.method.remote(...)` returns an awaitable, or a list of `num_returns`."""

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
        parts = [asyncio.ensure_future(_output(call, i), loop=self._loop) for i in range(self._outputs)]
        for part in parts:  # of a failed call only the last output is awaited; asyncio would warn about the others
            part.add_done_callback(lambda part: part.cancelled() or part.exception())
        return parts


async def _output(call, i: int):
    return (await call)[i]


class Rollout:
    """A rollout actor that takes some time for whatever it is sent and returns indices instead of trajectories.

    `decoded` has (index, weight version) of every request.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.version, self.decoded, self.seconds = -1, [], seconds
        self.waiting: list[RolloutRequest] = []
        self.added = 0

    async def load_weights(self, handle: WeightHandle) -> float:
        assert handle.version >= self.version, "a lower weight version was pushed"
        self.version = handle.version
        return 0.0

    async def open_stream(self, settings, slots: int, ahead: int) -> int:
        self.waiting, self.added = [], 0
        return slots + ahead

    async def add(self, requests, handle: WeightHandle) -> None:
        self.waiting += requests
        self.added += len(requests)

    async def harvest(self, eager: bool):
        await asyncio.sleep(self.seconds)
        requests, self.waiting = self.waiting, []
        self.decoded += [(r.index, self.version) for r in requests]
        return report_of(requests, self.version, room=1000, added=self.added)


class Teacher:
    """A teacher actor that returns the indices it is given; calls with the sample `fail_at` fail `times` times."""

    def __init__(self, fail_at: int | None = None, times: int = 0, error: Exception | None = None) -> None:
        self.fail_at, self.times, self.error = fail_at, times, error or RayError("out of memory")

    async def score(self, places, per_reference, watch, *groups):
        indices = [(await groups[group])[place] for group, place in places]
        if self.fail_at in indices and self.times > 0:
            self.times -= 1
            raise self.error
        return (*in_groups(indices, per_reference), ScoreStats(1, 1, 0.1, 1, ((1, 1),) * len(indices)))


class FakeRun:
    """The loops of one run with a real queue, connected as in `deploy/run/train.py`, and two fake actors.

    `trained` has the samples of each round, `pushed` the weight versions that every rollout actor has loaded.
    """

    def __init__(
        self, folder: Path, staleness: int, rollout: Rollout, teacher: Teacher, timeout_seconds: float = 600.0
    ) -> None:
        loop = asyncio.get_running_loop()
        self.loop = loop
        self.queue = ReplayQueueActor(N, staleness, N * ROUNDS, 0)
        self.trained: list[list[int]] = []
        pools = [
            ActorPool({n: Remote(a, loop)}, PATIENCE, 0) for n, a in (("rollout-0", rollout), ("teacher-0", teacher))
        ]
        config = config_from_dict(
            {
                "model": {"teacher": "t"},
                "data": {"path": "p"},
                "rollout": {"prompts_per_round": N},
                "learner": {"batch_size": N},
                "queue": {"max_staleness": staleness},
                "resources": {"call_timeout_seconds": timeout_seconds},
            }
        )
        order = PromptOrder([Prompt(str(i), np.array([1])) for i in range(N * ROUNDS)], 0, 1)
        view = type("View", (), {"show": lambda self, record: None})()
        self.pushed: list[int] = []
        self.records, roles = RunRecords(folder, view), Roles(Remote(self.queue, loop), *pools)
        scoring = Scoring(pools[1], self.records, 3, 64, N)
        source = OnPolicySource(config, pools[0], self.records, scoring.score, order)
        self.loops = Loops(config, roles, source, self.records, self._on_weights)

    async def _on_weights(self, handle: WeightHandle) -> None:
        self.pushed.append(handle.version)

    async def run(self, learn: Callable[[], None] | None = None) -> None:
        """Runs the loops and a learner (`learn`, or this class's own) to their end, for at most `PATIENCE` seconds."""
        await asyncio.wait_for(run_together(self.loops, learn or self.learn), timeout=PATIENCE)

    def ask(self, coroutine):
        """The result of a coroutine, for the learner's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=PATIENCE)

    def learn(self) -> None:
        """The learner, in its thread: takes each round, notes its samples, publishes the next weight version."""
        ask = self.ask
        ask(self.queue.publish(0, ["pack"], 8))
        for round_ in range(ROUNDS):
            taken = ask(self.queue.take_round(round_))
            if taken is None:
                return
            self.trained.append([ask(value_of_sample(s)) for s in taken[0]])
            ask(self.queue.publish(round_ + 1, ["pack"], 8))


def report_of(requests, version: int, room: int, added: int) -> tuple[list[int], StreamReport]:
    """What a rollout actor reports that has just decoded these requests; indices stand for the trajectories."""
    ended = tuple(EndedSequence(r.index, (1, 1), version, lane, 0.1, 0.0) for lane, r in enumerate(requests))
    return [r.index for r in requests], StreamReport(ended, room, added, 0, stats_of(version, len(requests)))


def stats_of(version: int, sequences: int) -> DecodeStats:
    """Statistics of a call that decoded all its sequences with one weight version."""
    return DecodeStats(version, sequences, 1, 1, 1, 1, 0.1, weight_versions=(version,) * sequences)


async def value_of_sample(sample):
    """The index that stands for the sample of a `SampleRef`."""
    return (await sample.group)[sample.place]
