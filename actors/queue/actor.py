"""The replay queue as a Ray actor: where the coordinator and the learner's ranks meet.

It holds references and small records, and owns the newest weights. Three mailboxes around
`ReplayQueue`'s rules: samples (coordinator -> learner), weights (learner -> coordinator), events (learner ->
coordinator: step metrics). Every method that waits wakes up on any change; callers bring their own time limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opdlm.actors.queue.rules import ReplayQueue
from opdlm.common.errors import first_line
from opdlm.common.types import WeightHandle
from opdlm.common.weight_offer import WeightOffer

log = logging.getLogger("opdlm.queue")

NAME = "replay-queue"


class ReplayQueueActor:
    """One a run. All methods are coroutines in one event loop, so none needs a lock."""

    def __init__(self, prompts_per_round: int, max_staleness: int, total: int, first_round: int) -> None:
        self._queue = ReplayQueue(prompts_per_round, max_staleness, total, first_round)
        self._weights: WeightHandle | None = None
        self._copy: Any = None
        """The newest weights, in the object store of this node: Ray keeps there what somebody looks at."""
        self._events: list[dict[str, Any]] = []
        self._arrived: dict[int, float] = {}
        """When each sample that waits for the learner was accepted."""
        self._wait_seconds = 0.0
        self._lost = 0
        self._waiting = 0
        """Learner ranks that wait for a round."""
        self._coordinator_seen = time.monotonic()
        self._stop = False
        self._handed_over = False
        self._listening = True
        self._changed = asyncio.Event()

    # --- coordinator's side -------------------------------------------------------------------------------------

    async def lease(self, most: int) -> list[int]:
        """Waits for free slots or lost samples; sample indices to decode. Empty: the learner has ended.

        After a stop only lost samples are leased: the round that was begun is finished.
        """
        queue = self._queue
        await self._until(lambda: self._ended or queue.lost > 0 or (queue.free_slots > 0 and not self._stop))
        if self._ended:
            return []
        return queue.lease_lost(most) if self._stop else queue.lease(most)

    async def put(self, indices: list[int], weight_version: int, samples: list[Any]) -> list[bool]:
        """Accepts finished samples (a `SampleRef` each); which of them were accepted."""
        accepted = [self._queue.put(i, weight_version, s) for i, s in zip(indices, samples, strict=True)]
        self._arrived |= {i: time.monotonic() for i, yes in zip(indices, accepted, strict=True) if yes}
        self._wake()
        return accepted

    async def next_weights(self, after: int) -> WeightHandle | None:
        """Waits for a version newer than `after`; None when the learner has ended."""
        await self._until(lambda: self._ended or (self._weights is not None and self._weights.version > after))
        newer = self._weights is not None and self._weights.version > after
        return self._weights if newer else None

    async def weights_taken(self, version: int) -> None:
        """The rollout actors hold this version; frees slots."""
        self._queue.weights_taken(version)
        self._wake()

    async def drain_events(self, patience_seconds: float) -> list[dict[str, Any]] | None:
        """Waits for events of the learner and hands them over; None when the learner has ended and all is told.

        Empty after so many seconds without any. Who asks again has written what was handed over before, and lives.
        """
        self._handed_over = False
        self._coordinator_seen = time.monotonic()
        self._wake()
        with contextlib.suppress(TimeoutError):  # then there are none
            async with asyncio.timeout(patience_seconds):
                await self._until(lambda: bool(self._events) or self._ended)
        if self._ended and not self._events:
            return None
        events, self._events = self._events, []
        self._handed_over = bool(events)
        return events

    async def nobody_listens(self) -> None:
        """Nobody will ask for events again, so nobody needs to wait until they are written."""
        self._listening = False
        self._wake()

    async def request_stop(self) -> None:
        """The learner finishes the round it has begun, saves, and ends; nothing more is leased."""
        self._stop = True
        self._wake()

    async def learner_ended(self) -> None:
        """Releases everybody who waits for the learner."""
        self._ended = True
        self._wake()

    async def state(self) -> dict[str, Any]:
        """Counts for the view and the metrics; the wait is that of the round last taken, mean over its samples."""
        queue = self._queue
        return {
            "queue_depth": queue.depth,
            "queue_leased": queue.leased,
            "queue_free_slots": queue.free_slots,
            "queue_slots_in_use": queue.slots_in_use,
            "queue_wait_seconds_mean": self._wait_seconds,
            "refused_duplicate": queue.refused["duplicate"],
            "refused_stale": queue.refused["stale"],
            "learner_waits": self._waiting > 0,
            "committed_rounds": queue.committed_rounds,
            "samples_made_again": self._lost,
            "weight_version": queue.version,
        }

    # --- learner's side -----------------------------------------------------------------------------------------

    async def take_round(self, round_: int) -> tuple[list[Any], list[int]] | None:
        """Waits for a whole round: (samples in index order, staleness of each). None: stop before this round.

        What the first rank is told, every rank is told.
        """
        self._waiting += 1
        try:
            begun = self._queue.handed_rounds  # a round that was begun is finished, whatever of it must be made again
            await self._until(lambda: self._queue.is_ready(round_) or (self._stop and round_ not in begun))
        finally:
            self._waiting -= 1
        if self._stop and round_ not in self._queue.handed_rounds:
            return None
        if round_ not in self._queue.handed_rounds:
            now = time.monotonic()
            waited = [now - self._arrived.pop(index) for index in self._queue.indices_of(round_)]
            self._wait_seconds = sum(waited) / len(waited)
        return self._queue.take_round(round_), self._queue.staleness(round_)

    async def coordinator_silent_seconds(self) -> float:
        """How long the coordinator, whose waits have time limits of their own, has not been heard of."""
        return time.monotonic() - self._coordinator_seen

    async def replace(self, index: int, lost: Any) -> Any:
        """Waits until a sample whose data is gone was made again; the new one."""
        if self._queue.lose(index, lost):
            self._lost += 1
            self._wake()
        await self._until(lambda: self._queue.sample(index) is not None)
        return self._queue.sample(index)

    async def publish(self, version: int, pack: list[Any], nbytes: int) -> None:
        """New weights; an older version (a restarted learner repeating itself) changes nothing.

        Args:
            pack: its one reference; the pack lives as long as the process that called for it or put it.
        """
        self._queue.published(version)
        if self._weights is None or version >= self._weights.version:
            self._weights = WeightHandle(version, pack, nbytes)
        self._wake()

    async def collect(self, outbox: WeightOffer) -> None:
        """The same of a pack that a rank has laid out: it outlives the rank, and soon the rank's node."""
        pack, stored = outbox.collect()
        await stored
        await self.publish(outbox.version, [pack], outbox.nbytes)
        self._copying = asyncio.create_task(self._keep_copy(outbox.version, pack))

    async def _keep_copy(self, version: int, pack: Any) -> None:
        """Has the newest weights on this node too, which is the driver's, while others load and decode with them.

        Where the learner's node dies with rollout actors and samples, those have to be made again with these weights.
        """
        try:
            copy = await pack
        except RayError as error:
            log.warning("weights of version %d have no second copy: %s", version, first_line(error))
            return
        if self._weights is not None and version == self._weights.version:
            self._copy = copy

    async def weights_again(self, lost: WeightHandle) -> WeightHandle | None:
        """Waits until a restarted learner has come to that version again; None when the learner has ended."""

        def found() -> bool:
            now = self._weights
            return now is not None and now.version >= lost.version and now.pack != lost.pack

        await self._until(lambda: self._ended or found())
        return self._weights if found() else None

    async def committed(self, rounds: int) -> None:
        """A checkpoint covers this many rounds."""
        self._queue.committed(rounds)

    async def events_written(self) -> None:
        """Waits until the coordinator has written every event so far: no checkpoint covers a step without a record."""
        await self._until(lambda: not self._listening or not (self._events or self._handed_over))

    async def give_up(self, reason: str) -> None:
        """The learner ends, and with it the run, as a failure."""
        self._reason_to_give_up = reason

    async def reason_to_give_up(self) -> str | None:
        """Why the learner ended the run as a failure; None where it did not."""
        return self._reason_to_give_up

    async def tell(self, events: list[dict[str, Any]]) -> None:
        """Records for the metrics."""
        self._events += events
        self._wake()

    # --- waiting ------------------------------------------------------------------------------------------------

    _ended = False
    _reason_to_give_up: str | None = None

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def start_queue(prompts_per_round: int, max_staleness: int, total: int, first_round: int, name: str = NAME) -> Any:
    """Starts the actor under a name, beside the driver: where that node dies, the run has ended anyway."""
    # Room for all who wait at one time: ranks, and calls whose callers gave up or died.
    actor = ray.remote(num_cpus=0, max_concurrency=10_000)(ReplayQueueActor)
    # Not soft: Ray 2.60 then put it on another node, although this one had room.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(name=name, scheduling_strategy=here).remote(
        prompts_per_round, max_staleness, total, first_round
    )
