"""A run in simulated time: the real loops, pools and queue, with actors and a learner that only take time.

A simulated rollout actor has one slot, and decodes nothing while it loads weights, unless `rollout.on_new_weights` is
`continue`. The learner is a coroutine instead of a thread, so the order of events depends on the virtual clock alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayError

from opdlm.actors.pool import ActorPool
from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.batches import in_groups
from opdlm.common.config import config_from_dict
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.types import RolloutRequest, WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.ending import run_together
from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.scoring import Scoring
from opdlm.deploy.run.sources import OnPolicySource
from tests.fakes.actors import Remote, report_of

Fault = Callable[[str], None]
"""Called with an actor's name at the end of each of its calls. If it raises an exception, the call fails with it."""
Jitter = Callable[[], float]
"""Returns a factor for the duration of the next call."""


class LearnerDiedError(Exception):
    """The learner died, and with it everything that it did after its last checkpoint."""


@dataclass(frozen=True)
class Stages:
    """Seconds that each stage takes for one round.

    decode, score: with all actors of the pool working; push: the time in which every rollout actor loads the weights.
    """

    decode: float
    score: float
    train: float
    push: float

    @property
    def total(self) -> float:
        """Seconds of a round whose stages follow each other."""
        return self.decode + self.score + self.train + self.push


@dataclass(frozen=True)
class Shape:
    """The numbers of a run."""

    staleness: int
    rounds: int
    prompts_per_round: int = 8
    rollouts: int = 1
    teachers: int = 1
    overrides: tuple[tuple[str, Any], ...] = ()
    """Further settings of the section `rollout`."""
    attempts: int = 3
    first_round: int = 0
    """The round with which a resumed run begins."""
    checkpoint_every: int = 1


class SimulatedRollout:
    """A rollout actor of one slot that waits as long as decoding takes, and returns indices instead of trajectories."""

    def __init__(self, run: SimulatedRun, name: str) -> None:
        self.run, self.name = run, name
        self.version, self.added = -1, 0
        self.waiting: deque[RolloutRequest] = deque()
        self._one_call = asyncio.Lock()

    async def load_weights(self, handle: WeightHandle) -> float:
        if self.run.config.rollout.on_new_weights == "continue":
            return await self._load(handle)
        async with self._one_call:
            return await self._load(handle)

    async def open_stream(self, settings: Any, slots: int, ahead: int) -> int:
        self.waiting, self.added = deque(), 0
        return 1

    async def add(self, requests: list[RolloutRequest], handle: WeightHandle) -> None:
        await self._load(handle)
        self.waiting.extend(requests)
        self.added += len(requests)

    async def harvest(self, eager: bool) -> tuple[Any, ...]:
        async with self._one_call:
            version, request = self.version, self.waiting.popleft()
            self.run.check_slots()
            await self.run.take_time(self.run.stages.decode, 1, self.run.shape.rollouts)
            try:
                self.run.fault(self.name)
            except RayError:
                self.waiting.clear()
                raise
            self.run.decoded.append((request.index, version))
            return report_of([request], version, 2 - len(self.waiting), self.added)

    async def ready(self) -> None:
        raise RayActorError  # the pool asks an actor that died: Ray does not restart it

    async def _load(self, handle: WeightHandle) -> float:
        if handle.version > self.version:
            await asyncio.sleep(self.run.stages.push)
            self.version = max(self.version, handle.version)
        return 0.0


class SimulatedTeacher:
    """A teacher actor that waits as long as scoring takes, and returns the indices that it is given."""

    def __init__(self, run: SimulatedRun, name: str) -> None:
        self.run, self.name = run, name
        self._one_call = asyncio.Lock()

    async def score(self, places: Any, per_reference: int, watch: Any, *groups: Any) -> tuple[Any, ...]:
        async with self._one_call:
            indices = [(await groups[group])[place] for group, place in places]
            began = asyncio.get_running_loop().time()
            await self.run.take_time(self.run.stages.score, len(indices), self.run.shape.teachers)
            self.run.teacher_seconds[self.name] += asyncio.get_running_loop().time() - began
            self.run.fault(self.name)
            return (*in_groups(indices, per_reference), ScoreStats(1, 1, 0.1, 1, ((1, 1),) * len(indices)))

    async def ready(self) -> None:
        raise RayActorError


class SimulatedRun:
    """One run of the loops. It must be created inside a virtual event loop (`virtual_time.py`)."""

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        stages: Stages,
        fault: Fault = lambda name: None,
        jitter: Jitter = lambda: 1.0,
        deaths: Iterable[str] = (),
        rollouts: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Arguments, besides what happens when:

        rollouts: makes the rollout actors by name, instead of the usual ones.
        deaths: for each round that the learner begins, after what it dies: `taken`, `trained` or `published`. With any
            other word it does not die.
        """
        self.shape, self.stages, self.fault, self.jitter = shape, stages, fault, jitter
        self.deaths = iter(deaths)
        loop, n = asyncio.get_running_loop(), shape.prompts_per_round
        self.queue = ReplayQueueActor(n, shape.staleness, n * shape.rounds, shape.first_round)
        self.trained: dict[int, list[int]] = {}
        """By round, the samples on which the present weights were trained."""
        self.committed = shape.first_round
        """Number of rounds that the last checkpoint covers."""
        self.handed: dict[int, list[int]] = {}
        """By round, the samples that the learner was given first. After a restart it must be given the same ones."""
        self.trained_at: list[float] = []
        """Virtual seconds at which the training of each round ended."""
        self.teacher_seconds: Counter[str] = Counter()
        """By teacher, virtual seconds in which it scored."""
        self.decoded: list[tuple[int, int]] = []
        """(sample, weight version) of everything that was decoded."""
        self.config = config = config_from_dict(
            {
                "model": {"teacher": "t"},
                "data": {"path": "p"},
                "rollout": {"prompts_per_round": n, "actors": shape.rollouts, **dict(shape.overrides)},
                "teacher": {"actors": shape.teachers},
                "learner": {"batch_size": n},
                "queue": {"max_staleness": shape.staleness},
                "resources": {"sample_attempts": shape.attempts},
            }
        )
        forever = 1e9
        usual = {f"rollout-{i}": SimulatedRollout(self, f"rollout-{i}") for i in range(shape.rollouts)}
        actors = usual if rollouts is None else rollouts()
        teachers = {f"teacher-{i}": SimulatedTeacher(self, f"teacher-{i}") for i in range(shape.teachers)}
        self.rollouts = ActorPool({name: Remote(a, loop) for name, a in actors.items()}, forever, 0)
        self.teachers = ActorPool({name: Remote(a, loop) for name, a in teachers.items()}, forever, 0)
        order = PromptOrder([Prompt(str(i), np.array([1])) for i in range(n * shape.rounds)], 0, 1)
        view = type("View", (), {"show": lambda self, record: None})()
        self.records = RunRecords(folder, view)
        roles = Roles(Remote(self.queue, loop), self.rollouts, self.teachers)
        scoring = Scoring(self.teachers, self.records, 3, 64, n)
        source = OnPolicySource(config, self.rollouts, self.records, scoring.score, order)
        self.loops = Loops(config, roles, source, self.records, self._on_weights)

    async def run(self) -> None:
        """Runs the loops until the learner has ended."""
        try:
            await run_together(self.loops, self._learn)  # type: ignore[arg-type]  # a coroutine: see test_async_rounds
        finally:
            self.records.close()

    async def _on_weights(self, handle: WeightHandle) -> None:
        """Evaluates nothing."""

    async def take_time(self, seconds: float, samples: int, actors: int) -> None:
        """Waits as long as one of `actors` actors works on `samples`, if all of them do a whole round in `seconds`."""
        await asyncio.sleep(seconds * samples * actors / self.shape.prompts_per_round * self.jitter())

    def check_slots(self) -> None:
        """Checks that no more samples are in the making than there are slots."""
        rules, n = self.queue._queue, self.shape.prompts_per_round
        assert rules.slots_in_use <= (self.shape.staleness + 1) * n, "more samples in the making than there are slots"

    async def _learn(self) -> None:
        """Takes a round, trains, publishes and saves, again and again. After a death it begins at its checkpoint."""
        while True:
            try:
                await self._publish(self.committed)
                for round_ in range(self.committed, self.shape.rounds):
                    if not await self._train(round_):
                        await self._save(round_)
                        return
                return
            except LearnerDiedError:
                self.trained = {r: samples for r, samples in self.trained.items() if r < self.committed}

    async def _train(self, round_: int) -> bool:
        """Trains one round; returns False if a stop comes before the round."""
        dies = next(self.deaths, "nowhere")
        taken = await self.queue.take_round(round_)
        if taken is None:
            return False
        assert all(0 <= staleness <= self.shape.staleness for staleness in taken[1])
        samples = [(await sample.group)[sample.place] for sample in taken[0]]
        assert self.handed.setdefault(round_, samples) == samples, "a round that is taken again has other samples"
        self._die(dies == "taken")
        await asyncio.sleep(self.stages.train * self.jitter())
        self.check_slots()
        self.trained[round_] = samples
        self.trained_at.append(asyncio.get_running_loop().time())
        self._die(dies == "trained")
        await self._publish(round_ + 1)
        self._die(dies == "published")
        if (round_ + 1) % self.shape.checkpoint_every == 0 or round_ + 1 == self.shape.rounds:
            await self._save(round_ + 1)
        return True

    async def _publish(self, version: int) -> None:
        await self.queue.publish(version, ["pack"], 8)

    async def _save(self, rounds: int) -> None:
        self.committed = rounds
        await self.queue.committed(rounds)

    @staticmethod
    def _die(now: bool) -> None:
        if now:
            raise LearnerDiedError

    def seconds_per_round(self) -> float:
        """Virtual seconds of a round in the steady state: the mean over the second half of the run."""
        half = len(self.trained_at) // 2
        return (self.trained_at[-1] - self.trained_at[half - 1]) / (len(self.trained_at) - half)
