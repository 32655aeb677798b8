"""A rank's side of the replay queue: rounds and samples in, weights and records out. Every wait names what for."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from opdlm.common.errors import OpdlmError
from opdlm.common.retry import StoreWait, store_is_full
from opdlm.common.samples import SampleRef
from opdlm.common.types import WeightPack
from opdlm.common.weight_offer import offered

_BETWEEN_STEPS_SECONDS = 0.2
"""Between two messages of nothing but steps: one a step of a small model would keep queue and driver busy."""
_PUBLISHING = "publishing weights"


class QueueClient:
    """Calls to the queue actor.

    Args:
        queue: handle of the actor.
        rank: of this process, for errors.
        timeout_seconds: longest wait for anything but a round (`resources.call_timeout_seconds`).
    """

    def __init__(self, queue: Any, rank: int, timeout_seconds: float) -> None:
        self._queue, self._rank, self._limit = queue, rank, timeout_seconds
        self._untold: list[dict[str, Any]] = []
        self._last_told = 0.0

    def ask(self, reference: Any, what: str) -> Any:
        """The value of a reference, or a list's values.

        Raises:
            OpdlmError: no answer in time.
        """
        try:
            return ray.get(reference, timeout=self._limit)
        except GetTimeoutError:
            raise OpdlmError(
                f"learner rank {self._rank} waited {self._limit:g} s for {what} (resources.call_timeout_seconds)"
            ) from None

    def take_round(self, round_: int) -> tuple[list[SampleRef], list[int]] | None:
        """Waits for a round as long as somebody works on it: the coordinator's waits have limits of their own.

        Returns: (samples by place in the round, staleness of each); None: stop before this round.
        """
        while True:
            try:
                return ray.get(self._queue.take_round.remote(round_), timeout=self._limit)
            except GetTimeoutError:
                silent = self.ask(self._queue.coordinator_silent_seconds.remote(), "the replay queue")
                if silent > self._limit:
                    raise OpdlmError(
                        f"learner rank {self._rank} waited for round {round_}, and the coordinator has been silent "
                        f"for {silent:.0f} s (resources.call_timeout_seconds {self._limit:g})"
                    ) from None

    def replace(self, index: int, lost: SampleRef) -> SampleRef:
        """Waits until a sample whose data is gone was made again."""
        return self.ask(self._queue.replace.remote(index, lost), f"sample {index}, whose data died, to be made again")

    def publish_held(self, pack: WeightPack) -> None:
        """Hands over where weights on this rank's device are: rollout actors read them there (Ray Direct Transport)."""
        reference = ray.put(pack, _tensor_transport="nixl")
        self.ask(self._queue.publish.remote(pack.version, [reference], pack.nbytes), _PUBLISHING)

    def publish(self, pack: WeightPack) -> None:
        """Hands weights over; waits for room where the object store is full, as the producers do."""
        store, me = StoreWait(self._limit), ray.get_runtime_context().current_actor
        with offered(me, pack) as outbox:
            while True:
                try:
                    self.ask(self._queue.collect.remote(outbox), _PUBLISHING)
                    return
                except RayError as error:
                    if not store_is_full(error):
                        raise
                    time.sleep(store.pause(f"weights of version {pack.version}"))

    def committed_rounds(self) -> int:
        """Rounds that need not be trained again: what the driver began with, or the last `committed`."""
        return self.ask(self._queue.state.remote(), "the replay queue")["committed_rounds"]

    def committed(self, rounds: int) -> None:
        """A checkpoint covers this many rounds: the queue lets go of them."""
        self.ask(self._queue.committed.remote(rounds), "committing a checkpoint")

    def wait_until_written(self) -> None:
        """Until the coordinator has written what it was told so far."""
        self._tell_all()
        self.ask(self._queue.events_written.remote(), "the coordinator to write its metrics")

    def give_up(self, reason: str) -> None:
        """Has the driver end the run with this, once it has written what it was told before."""
        self.wait_until_written()
        self.ask(self._queue.give_up.remote(reason), "giving up")

    def tell(self, event: dict[str, Any]) -> None:
        """A record for the metrics, with the time at which it is told. A step's may wait for the next one."""
        self._untold.append({"told_at": time.time(), **event})
        if event["kind"] != "step" or time.monotonic() - self._last_told >= _BETWEEN_STEPS_SECONDS:
            self._tell_all()

    def _tell_all(self) -> None:
        if self._untold:
            self._queue.tell.remote(self._untold)
        self._untold, self._last_told = [], time.monotonic()
