"""A rank's side of the replay queue: takes rounds and samples, hands over weights and records.

Every wait has a limit, and its error says what was waited for.
"""

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
"""Shortest time between two messages that hold only steps. A small model makes so many steps that a message for each
would keep queue and driver busy."""
_PUBLISHING = "publishing weights"


class QueueClient:
    """Calls to the queue actor.

    Args:
        queue: handle of the actor.
        rank: this process's, for errors.
        timeout_seconds: longest wait for anything but a round (`resources.call_timeout_seconds`).
    """

    def __init__(self, queue: Any, rank: int, timeout_seconds: float) -> None:
        self._queue, self._rank, self._limit = queue, rank, timeout_seconds
        self._untold: list[dict[str, Any]] = []
        self._last_told = 0.0

    def wait_for(self, reference: Any, what: str) -> Any:
        """The value of an object reference, or the values of a list of references. Raises Ray's errors unchanged.

        Args:
            what: what is waited for, in words for an error.

        Raises:
            OpdlmError: there was no value in time.
        """
        try:
            return ray.get(reference, timeout=self._limit)
        except GetTimeoutError:
            raise OpdlmError(
                f"learner rank {self._rank} waited {self._limit:g} s for {what} (resources.call_timeout_seconds)"
            ) from None

    def take_round(self, round_: int) -> tuple[list[SampleRef], list[int]] | None:
        """Waits for a round as long as the driver is alive, whose own waits for actors have limits.

        Returns: (the samples by place in the round, the staleness of each); None where the run stops before this round.

        Raises:
            OpdlmError: the driver has been silent for too long.
        """
        while True:
            try:
                return ray.get(self._queue.take_round.remote(round_), timeout=self._limit)
            except GetTimeoutError:
                silent = self.wait_for(self._queue.driver_silent_seconds.remote(), "the replay queue")
                if silent > self._limit:
                    raise OpdlmError(
                        f"learner rank {self._rank} waited for round {round_}, and the driver has been silent "
                        f"for {silent:.0f} s (resources.call_timeout_seconds {self._limit:g})"
                    ) from None

    def ends_early(self) -> bool:
        """Whether the run, which takes no further round, is finished; equal on every rank."""
        return self.wait_for(self._queue.ends_early.remote(), "the replay queue")

    def remade_sample(self, index: int, lost: SampleRef) -> SampleRef:
        """Waits until a sample whose data is lost has been made again; returns the new one."""
        what = f"sample {index}, whose data was lost, to be made again"
        return self.wait_for(self._queue.remade_sample.remote(index, lost), what)

    def publish_held(self, pack: WeightPack) -> None:
        """Publishes weights that stay on this rank's device, where rollout actors read them (Ray Direct Transport)."""
        reference = ray.put(pack, _tensor_transport="nixl")
        self.wait_for(self._queue.publish.remote(pack.version, [reference], pack.nbytes), _PUBLISHING)

    def publish(self, pack: WeightPack) -> None:
        """Publishes weights through the object store; where it is full, waits for room, as the producers do."""
        store_wait, here = StoreWait(self._limit), ray.get_runtime_context()
        with offered(here.current_actor, here.get_node_id(), pack) as offer:
            while True:
                try:
                    self.wait_for(self._queue.publish_offer.remote(offer), _PUBLISHING)
                    return
                except RayError as error:
                    if not store_is_full(error):
                        raise
                    time.sleep(store_wait.pause(f"weights of version {pack.version}"))

    def committed_rounds(self) -> int:
        """Rounds that need not be trained again: those of the last `committed`, or those the run started after."""
        return self.wait_for(self._queue.state.remote(), "the replay queue")["committed_rounds"]

    def committed(self, rounds: int) -> None:
        """Says that a checkpoint covers this many rounds, so the queue releases their samples."""
        self.wait_for(self._queue.committed.remote(rounds), "committing a checkpoint")

    def wait_until_written(self) -> None:
        """Waits until the driver has written every record so far."""
        self._tell_all()
        self.wait_for(self._queue.events_written.remote(), "the driver to write its metrics")

    def give_up(self, reason: str) -> None:
        """Has the driver end the run as a failure with this reason, once every record so far is written."""
        self.wait_until_written()
        self.wait_for(self._queue.give_up.remote(reason), "giving up")

    def go_back(self, reason: str) -> None:
        """Has the driver start again from an older checkpoint than the queue's, once every record is written."""
        self.wait_until_written()
        self.wait_for(self._queue.go_back.remote(reason), "going back")

    def tell(self, event: dict[str, Any]) -> None:
        """Sends a record for the metrics, with the present time. A step's record may wait for the next record."""
        self._untold.append({"told_at": time.time(), **event})
        if event["kind"] != "step" or time.monotonic() - self._last_told >= _BETWEEN_STEPS_SECONDS:
            self._tell_all()

    def _tell_all(self) -> None:
        if self._untold:
            self._queue.tell.remote(self._untold)
        self._untold, self._last_told = [], time.monotonic()
