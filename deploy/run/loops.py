"""The loops of a run in the driver: they move references and counts between the actors, never tensors.

`train.py` shows how they work together. What happens when something fails is in `recovery.py`.

Slots bound staleness: a prompt needs a free slot of the queue, and `push` frees the slots of a round only after every
rollout actor has the weights that the round helped to make. So `produce` runs at most `queue.max_staleness` rounds
ahead of the learner, nothing is ever too stale, and nothing is thrown away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from opdlm.actors.queue.rules import Answer
from opdlm.common.batches import in_groups
from opdlm.common.config import OpdlmConfig
from opdlm.common.samples import SampleRef
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.recovery import Repetition, SamplesStale, learner_events
from opdlm.deploy.run.sample_references import SampleReferences
from opdlm.deploy.run.sources import SampleSource
from opdlm.deploy.run.together import Together


class Loops:
    """One set of loops around one replay queue.

    Args:
        source: makes samples: decodes and scores, or takes given responses.
        on_weights: awaited after each push, before decoding goes on with the new weights (evaluation).
    """

    def __init__(
        self,
        config: OpdlmConfig,
        roles: Roles,
        source: SampleSource,
        records: RunRecords,
        on_weights: Callable[[WeightHandle], Awaitable[None]],
    ) -> None:
        self.config, self.roles, self.source = config, roles, source
        self.records, self.on_weights = records, on_weights
        self.stopping = False
        """Whether an end with a checkpoint was asked for."""
        self.finishing = False
        """Whether training ends early, as a finished run."""
        self._calls = Repetition(config, roles.queue, records)
        self._references = SampleReferences(config.rollout.samples_per_round)
        self._put = Together(self._put_together)

    @property
    def weights(self) -> WeightHandle | None:
        """The newest version that every rollout actor has loaded; None before the first one."""
        return self._calls.weights

    async def produce(self) -> None:
        """Makes samples whenever slots are free and the source has room, until the learner has ended."""
        async with asyncio.TaskGroup() as tasks:
            while indices := await self.roles.queue.lease.remote(await self.source.room()):
                for together in in_groups(indices, self.source.together):
                    tasks.create_task(self._make_samples(together))

    async def _make_samples(self, indices: list[int]) -> None:
        assert self.weights is not None, "slots are free only after the first push"

        missing = list(indices)

        async def make(weights: WeightHandle) -> None:
            samples, versions = await self.source.sample(missing, weights)
            self._references.hold(missing, samples)
            made = zip(missing, versions, samples, strict=True)
            answers = await asyncio.gather(*(self._put.send(one) for one in made))
            missing[:] = [index for index, answer in zip(missing, answers, strict=True) if answer == "stale"]
            if missing:
                raise SamplesStale(missing, min(versions))

        name = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} to {indices[-1]}"
        await self._calls.until_done(make, self.weights, name, missing)

    async def _put_together(self, made: list[tuple[int, int, SampleRef]]) -> list[Answer]:
        """Hands samples to the queue: (index, oldest weights, sample) each."""
        indices, versions, samples = (list(column) for column in zip(*made, strict=True))
        answers: list[Answer] = await self.roles.queue.put.remote(indices, versions, samples)
        return answers

    async def push(self) -> None:
        """Loads each new version into every rollout actor, evaluates it where due, then frees its samples' slots."""
        queue: Any = self.roles.queue
        while published := await queue.next_weights.remote(self.weights.version if self.weights else -1):
            started = time.perf_counter()
            what = f"loading weights of version {published.version}"
            loaded = await self._calls.until_done(self._load, published, what)
            if loaded is None:  # the learner has ended
                return
            self._calls.weights = loaded
            self.records.pushed(loaded, time.perf_counter() - started)
            await self._calls.until_done(self.on_weights, loaded, f"evaluating version {loaded.version}")
            await queue.weights_taken.remote(loaded.version)

    async def _load(self, handle: WeightHandle) -> None:
        # An actor that has the version already does nothing, so a repeated call costs little.
        await self.roles.rollouts.broadcast("load_weights", handle)

    async def record(self) -> None:
        """Writes the records of the learner's events, until it has ended."""
        limit = self.config.resources.call_timeout_seconds
        async for events, state in learner_events(self.roles.queue, limit):
            self._references.committed(state.pop("committed_rounds"))
            if events:
                self.records.learned(events, state | self.roles.sizes())

    def how_it_ends(self, rounds: int) -> str:
        """In words, what a stop does now. `rounds`: of the whole run."""
        if self.weights is None:
            return "the run ends before its first round, as soon as the models are loaded"
        now = min(self.weights.version + 1, rounds)
        return f"round {now} of {rounds} is finished if its training has begun, then a checkpoint is written"

    async def stop(self) -> None:
        """Asks for an end with a checkpoint: nothing more is leased, the learner finishes its round, saves and ends."""
        self.stopping = True
        await self.roles.queue.request_stop.remote()

    async def stop_after_round(self, rounds: int) -> int:
        """Asks for an end with a checkpoint after the round that is being made; returns the rounds trained then.

        `rounds`: of the whole run. If the last one is being made, the run ends as it would have.
        """
        end: int = await self.roles.queue.end_after_round.remote()
        self.stopping = self.stopping or end < rounds
        return end

    async def finish(self) -> bool:
        """Ends training early: as `stop`, but the run is finished. False: an end was asked for before, and that holds.

        The newest weights are still pushed, so that they can be evaluated.
        """
        self.finishing = bool(await self.roles.queue.request_stop.remote(True))
        return self.finishing
