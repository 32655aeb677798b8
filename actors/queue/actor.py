"""The replay queue as a Ray actor: the driver's loops and the learner's ranks meet here.

The actor holds references and small records, and it owns the newest weights. It passes on samples (loops -> learner),
weights (learner -> loops) and events, which are the metrics of the learner's steps (learner -> loops). The rules for
samples are those of `ReplayQueue` (`actors/queue/rules.py`). A method that waits checks its condition after every
change of the queue; time limits are up to the caller.

"The driver" is the process that runs the loops (`deploy/run/loops.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opdlm.actors.progress import ProgressBoard
from opdlm.actors.queue.rules import Answer, ReplayQueue
from opdlm.actors.queue.second_copy import SecondCopy
from opdlm.common.types import WeightHandle
from opdlm.common.weight_offer import WeightOffer

log = logging.getLogger("opdlm.queue")

NAME = "replay-queue"


class ReplayQueueActor(ProgressBoard):
    """The one queue of a run. All methods are coroutines in one event loop, so none needs a lock.

    Its arguments are those of `ReplayQueue`.
    """

    def __init__(
        self, prompts_per_round: int, max_staleness: int, total: int, first_round: int, group: int = 1
    ) -> None:
        super().__init__()
        self._queue = ReplayQueue(prompts_per_round, max_staleness, total, first_round, group)
        self._weights: WeightHandle | None = None
        self._second_copy = SecondCopy()
        self._copying: asyncio.Task[None] | None = None
        """The task that copies the newest weights; kept because asyncio itself keeps no reference to a task."""
        self._events: list[dict[str, Any]] = []
        self._accepted_at: dict[int, float] = {}
        """By index, for each sample that waits for the learner: the time at which it was accepted."""
        self._mean_wait_seconds = 0.0
        """Mean wait of the samples of the round that was taken last."""
        self._samples_made_again = 0
        self._waiting_ranks = 0
        """Number of learner ranks that wait for a round."""
        self._driver_heard = time.monotonic()
        """Time of the driver's last request for events."""
        self._events_being_written = False
        """The driver has received events and not asked for more since, so it may not have written them yet."""
        self._driver_listens = True
        self._learner_ended = False
        self._failure: str | None = None
        """Why the learner ended the run as a failure."""
        self._behind: str | None = None
        """Why the learner must go back to rounds before those that are committed."""
        self._changed = asyncio.Event()
        """Set by `_wake` and then replaced by a new event; `_until` waits for it."""

    # --- called by the driver ------------------------------------------------------------------------------

    async def lease(self, most: int) -> list[int]:
        """Waits for free slots or lost samples; returns about `most` sample indices to decode, or none at the end.

        The responses to one prompt are leased together.

        After a requested stop, it leases lost samples only: they are needed to finish the round that was begun. The
        list is empty once the learner has ended.
        """
        queue = self._queue
        await self._until(lambda: self._learner_ended or queue.lost > 0 or queue.free_slots > 0)
        return [] if self._learner_ended else queue.lease(most)

    async def put(self, indices: list[int], weight_versions: list[int], samples: list[Any]) -> list[Answer]:
        """Takes in finished samples (one `SampleRef` each); returns the answer to each, see `ReplayQueue.put`.

        Args:
            weight_versions: of each sample, the oldest weights that decoded it.
        """
        made = zip(indices, weight_versions, samples, strict=True)
        answers = [self._queue.put(index, version, sample) for index, version, sample in made]
        accepted = [index for index, answer in zip(indices, answers, strict=True) if answer == "accepted"]
        self._accepted_at |= dict.fromkeys(accepted, time.monotonic())
        self._wake()
        return answers

    async def next_weights(self, after: int) -> WeightHandle | None:
        """Waits for a weight version newer than `after` and returns it; None once the learner has ended without one."""
        await self._until(lambda: self._learner_ended or (self._weights is not None and self._weights.version > after))
        newer = self._weights is not None and self._weights.version > after
        return self._weights if newer else None

    async def weights_taken(self, version: int) -> None:
        """Notes that the rollout actors hold this version, which frees slots."""
        self._queue.weights_taken(version)
        self._wake()

    async def take_events(self, patience_seconds: float) -> list[dict[str, Any]] | None:
        """Waits for events of the learner and returns them; None once the learner has ended and all were returned.

        The list is empty if there was no event for `patience_seconds`. Each call also says that the driver is
        alive and has written the events that it received before.
        """
        self._events_being_written = False
        self._driver_heard = time.monotonic()
        self._wake()
        with contextlib.suppress(TimeoutError):  # no events: returns an empty list
            async with asyncio.timeout(patience_seconds):
                await self._until(lambda: bool(self._events) or self._learner_ended)
        if self._learner_ended and not self._events:
            return None
        events, self._events = self._events, []
        self._events_being_written = bool(events)
        return events

    async def driver_stops_listening(self) -> None:
        """The driver will not ask for events again, so `events_written` must not wait for it any more."""
        self._driver_listens = False
        self._wake()

    async def request_stop(self, finish: bool = False) -> bool:
        """Requests an orderly end: no new sample is leased; the learner finishes its round, saves and ends.

        `finish`: the learner also exports the student, because the run is finished then. Returns whether it is.
        """
        self._queue.stop(finish)
        self._wake()
        return self._queue.ends_early

    async def end_after_round(self) -> int:
        """Requests an end after the round that is being made; returns how many rounds of the run are trained then."""
        self._queue.stop_after_round()
        self._wake()
        return self._queue.last_round

    async def learner_ended(self) -> None:
        """Notes that the learner has ended, which ends every wait for it."""
        self._learner_ended = True
        self._wake()

    async def state(self) -> dict[str, Any]:
        """Counts for the live view and the metrics. The wait is the mean over the samples of the round taken last."""
        queue = self._queue
        return {
            "queue_depth": queue.depth,
            "queue_leased": queue.leased,
            "queue_free_slots": queue.free_slots,
            "queue_slots_in_use": queue.slots_in_use,
            "queue_wait_seconds_mean": self._mean_wait_seconds,
            "refused_duplicate": queue.refused["duplicate"],
            "refused_stale": queue.refused["stale"],
            "learner_waits": self._waiting_ranks > 0,
            "committed_rounds": queue.committed_rounds,
            "samples_made_again": self._samples_made_again,
            "weight_version": queue.version,
        }

    # --- called by the learner's ranks --------------------------------------------------------------------------

    async def take_round(self, round_: int) -> tuple[list[Any], list[int]] | None:
        """Waits until a round is complete; every rank gets the same answer as the first.

        Returns: (samples in index order, staleness of each); None if an end was requested before any rank had taken it.
        """
        self._waiting_ranks += 1
        try:
            await self._until(lambda: self._queue.is_ready(round_) or self._queue.ends_before(round_))
        finally:
            self._waiting_ranks -= 1
        if self._queue.ends_before(round_):
            return None
        if round_ not in self._queue.taken_rounds:
            now = time.monotonic()
            waited = [now - self._accepted_at.pop(index) for index in self._queue.indices_of(round_)]
            self._mean_wait_seconds = sum(waited) / len(waited)
        return self._queue.take_round(round_), self._queue.staleness(round_)

    async def ends_early(self) -> bool:
        """After a `take_round` that gave None: whether the run is finished although rounds are left."""
        return self._queue.ends_early

    async def driver_silent_seconds(self) -> float:
        """Seconds since the driver last asked for events. It asks regularly while it is alive."""
        return time.monotonic() - self._driver_heard

    async def remade_sample(self, index: int, lost: Any) -> Any:
        """Reports that the data of a sample is gone; waits until the sample was made again and returns the new one.

        Other responses to its prompt whose data is in the same list are gone with it.
        """
        if self._queue.lose(index, lost):
            gone = [index]
            for other in self._queue.group_of(index):
                sample = self._queue.sample(other)
                if sample is not None and sample.group == lost.group and self._queue.lose(other, sample):
                    gone.append(other)
            self._samples_made_again += len(gone)
            self._wake()
        await self._until(lambda: self._queue.sample(index) is not None)
        return self._queue.sample(index)

    async def publish(self, version: int, pack: list[Any], nbytes: int) -> None:
        """Takes in new weights. An older version, which a restarted learner publishes again, changes nothing.

        Args:
            pack: a list of the one reference to the `WeightPack`, which lives as long as the process that owns the
                reference.
            nbytes: size of the pack.
        """
        self._queue.published(version)
        if self._weights is None or version >= self._weights.version:
            self._weights = WeightHandle(version, pack, nbytes)
        self._wake()

    async def publish_offer(self, offer: WeightOffer) -> None:
        """Publishes weights that a rank offers. The queue owns the pack, so the pack outlives the rank.

        Once there is a second copy, made while the rollout actors load the pack, it also outlives the rank's node.
        """
        pack, stored = offer.collect()
        await stored
        await self.publish(offer.version, [pack], offer.nbytes)
        if self._weights is not None and self._weights.pack[0] is pack:  # an older version needs no copy
            self._copying = asyncio.create_task(self._second_copy.keep(offer, pack))

    async def republished_weights(self, lost: WeightHandle) -> WeightHandle | None:
        """Waits until a restarted learner has published the lost version, or a later one, again.

        Returns: the new handle; None once the learner has ended without publishing it.
        """

        def republished() -> bool:
            now = self._weights
            return now is not None and now.version >= lost.version and now.pack != lost.pack

        await self._until(lambda: self._learner_ended or republished())
        return self._weights if republished() else None

    async def committed(self, rounds: int) -> None:
        """Notes that a checkpoint covers the first `rounds` rounds of the run, so their samples can be forgotten."""
        self._queue.committed(rounds)

    async def events_written(self) -> None:
        """Waits until the driver has written every event so far: a checkpoint covers only recorded steps."""
        await self._until(lambda: not self._driver_listens or not (self._events or self._events_being_written))

    async def give_up(self, reason: str) -> None:
        """Notes that the learner ends the run as a failure."""
        self._failure = reason

    async def reason_to_give_up(self) -> str | None:
        """Why the learner ended the run as a failure; None if it did not."""
        return self._failure

    async def go_back(self, reason: str) -> None:
        """Notes that the learner must train rounds again whose samples this queue has forgotten."""
        self._behind = reason

    async def reason_to_go_back(self) -> str | None:
        """Why the learner needs a new queue that begins at an older checkpoint; None if it does not."""
        return self._behind

    async def tell(self, events: list[dict[str, Any]]) -> None:
        """Takes in events: records for the metrics."""
        self._events += events
        self._wake()

    # --- waiting ------------------------------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def start_queue(
    prompts_per_round: int, max_staleness: int, total: int, first_round: int, group: int = 1, name: str = NAME
) -> Any:
    """Starts the queue actor on the driver's node, whose death ends the run anyway, and returns its handle."""
    # All waiting calls run at the same time: those of the ranks, and those whose callers gave up or died.
    actor = ray.remote(num_cpus=0, max_concurrency=10_000)(ReplayQueueActor)
    # With `soft=True`, Ray 2.60 placed the actor on another node although this one had room.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(name=name, scheduling_strategy=here).remote(
        prompts_per_round, max_staleness, total, first_round, group
    )
