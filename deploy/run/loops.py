"""The loops that keep the actors busy. References and counts move here; tensors never do.

    loop       consumes                        produces                            waits for; is woken by
    produce    free slots (queue.lease)        a task per chunk: source.sample,    a free slot; weights_taken
                                               queue.put
    push       weights (queue.next_weights)    load_weights on every rollout       a new version; the learner's publish
                                               actor, queue.weights_taken
    watch      events (queue.drain_events)     metrics, the live view              an event; the learner's tell
    learner    rounds (queue.take_round)       publish, checkpoints, events        a whole round; queue.put
               (Ray Train, in a thread)

`produce` may run `max_staleness` rounds ahead of the learner: a slot is freed only by `push`, after the weights that
its sample helped to make were taken. A stop (SIGINT, SIGTERM, an error in any loop) goes to the queue: nothing more
is leased, the learner finishes its round, saves and ends, and that ends the other loops. Deaths of rollout and teacher
actors stay in their pools; the death of the queue ends all loops (see `deploy/run/recovery.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError, WeightsLost, last_line
from opdlm.common.retry import StoreWait, store_is_full
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.sample_references import SampleReferences
from opdlm.deploy.run.sources import SampleSource
from opdlm.deploy.run.threads import in_daemon_thread

log = logging.getLogger("opdlm.coordinator")

_HEARTBEAT_SECONDS = 10.0
"""Between two signs of the coordinator's life to the learner, at most."""

_LOST_PAUSE_SECONDS = 10.0
"""Until lost weights are asked for again."""

_LIMIT = "(resources.call_timeout_seconds); is there room in the cluster for its ranks?"

Hook = Callable[[WeightHandle], Awaitable[None]]


class LearnerSilent(OpdlmError):
    """The learner hangs: nobody waits for its end."""


class Loops:
    """Wires the roles of one run. `on_weights` is awaited after each push, before decoding goes on (evaluation)."""

    def __init__(
        self, config: OpdlmConfig, roles: Roles, source: SampleSource, telemetry: RunRecords, on_weights: Hook
    ) -> None:
        self.config, self.roles, self.source = config, roles, source
        self.telemetry, self.on_weights = telemetry, on_weights
        self.weights: WeightHandle | None = None
        self._keeper = SampleReferences(config.rollout.prompts_per_round)
        self._stopping = False
        self._lost_since: dict[int, float] = {}
        """By version, when its data was first found lost."""

    async def run(self, fit: Callable[[], None]) -> None:
        """Runs to the end of the learner; `fit` blocks in a thread meanwhile."""
        producing = [asyncio.create_task(loop()) for loop in (self._produce, self._push)]
        loops = [*producing, asyncio.create_task(self._watch(self.telemetry.learned))]
        loops[-1].add_done_callback(lambda _: self.roles.queue.nobody_listens.remote())
        learner = in_daemon_thread(fit)
        learner.add_done_callback(lambda _: self.roles.queue.learner_ended.remote())
        together: asyncio.Future[Any] = asyncio.gather(*loops)  # before the learner has ended, it ends only by failing
        ends: list[asyncio.Future[Any]] = [learner, together]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not learner.done() and not isinstance(together.exception(), LearnerSilent):
            with contextlib.suppress(RayActorError):  # of a dead queue the learner learns by itself
                await self.stop()
            await self._outlast(learner, loops[-1])
        # After a stop, what is being decoded or pushed is of no use. Else these loops end by themselves.
        for task in loops if together.done() or learner.exception() else producing if self._stopping else []:
            task.cancel()
        ended = [learner] if learner.done() else []
        for error in await asyncio.gather(together, *loops, *ended, return_exceptions=True):
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if isinstance(error, Exception):
                raise error

    async def _outlast(self, learner: asyncio.Future[Any], watch: asyncio.Task[None]) -> None:
        """Waits for the end of a learner that was told to stop, as long as it is heard of. A loop has failed."""
        if watch.done():
            watch = asyncio.create_task(self._watch(lambda events, state: None))
        await asyncio.wait([learner, watch], return_when=asyncio.FIRST_COMPLETED)
        if not watch.done():
            return
        reason = str(watch.exception())
        if not isinstance(watch.exception(), LearnerSilent):  # the learner has just ended, or the queue is dead
            limit = self.config.resources.call_timeout_seconds
            await asyncio.wait([learner], timeout=limit)
            reason = f"learner: it has not ended {limit:g} s after the replay queue {_LIMIT}"
        if not learner.done():
            log.error("the run ends without a last checkpoint: %s", reason)

    async def stop(self) -> None:
        """Asks for an end with a checkpoint."""
        self._stopping = True
        await self.roles.queue.request_stop.remote()

    async def _produce(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while indices := await self.roles.queue.lease.remote(self._chunk()):
                tasks.create_task(self._sample(indices))

    def _chunk(self) -> int:
        """Prompts of one call: at most the share of a round of each actor that serves at the moment."""
        rollout = self.config.rollout
        share = -(-rollout.prompts_per_round // max(self.roles.rollouts.serving, 1))
        return min(rollout.prompts_per_call or share, share)

    async def _sample(self, indices: list[int]) -> None:
        assert self.weights is not None, "slots are free only after the first push"
        attempt, store = 1, StoreWait(self.config.resources.call_timeout_seconds)
        weights: WeightHandle | None = self.weights
        while weights is not None:
            try:
                samples, version = await self.source.sample(indices, weights)
                self._lost_since.pop(weights.version, None)
                self._keeper.keep(indices, samples)
                await self.roles.queue.put.remote(indices, version, samples)
                return
            except RayActorError:  # the queue itself: the pools keep their actors' deaths to themselves
                raise
            except WeightsLost as error:
                weights = await self._published_again(weights, error)
            except RayError as error:  # a failed score is an error and a retry, never zeros (METHOD.md section 3)
                reason = self._failed(indices, attempt, error)
                if store_is_full(error):  # no fault of the samples: the learner must let go of some first
                    await asyncio.sleep(store.pause(f"samples {indices[0]} to {indices[-1]}"))
                    continue
                if attempt == self.config.resources.sample_attempts:
                    raise OpdlmError(
                        f"samples {indices[0]} to {indices[-1]} failed {attempt} times (resources.sample_attempts): "
                        f"{reason}"
                    ) from error
                attempt += 1
                weights = self.weights

    def _failed(self, indices: list[int], attempt: int, error: Exception) -> str:
        """Records a call that failed; its last line, which says why."""
        reason = last_line(error)
        self.telemetry.failed(indices, attempt, reason, type(error).__name__)
        return reason

    async def _push(self) -> None:
        queue: Any = self.roles.queue
        while handle := await queue.next_weights.remote(self.weights.version if self.weights else -1):
            started = time.perf_counter()
            if (handle := await self._load_everywhere(handle)) is None:
                return
            self.weights = handle
            self.telemetry.pushed(handle, time.perf_counter() - started)
            await self._hook(handle)
            await queue.weights_taken.remote(handle.version)

    async def _hook(self, handle: WeightHandle) -> None:
        again: WeightHandle | None = handle
        while again is not None:
            try:
                await self.on_weights(again)
                return
            except WeightsLost as error:
                again = await self._published_again(again, error)

    async def _load_everywhere(self, handle: WeightHandle) -> WeightHandle | None:
        """Again where an actor could not take it, out of memory once, say: those that have the version do nothing.

        Returns: what they took, a later one where the version's data was lost; None when the learner has ended.
        """
        attempt = 1
        while True:
            try:
                await self.roles.rollouts.broadcast("load_weights", handle)
                self._lost_since.pop(handle.version, None)
                return handle
            except WeightsLost as error:
                if (again := await self._published_again(handle, error)) is None:
                    return None
                handle = again
            except RayTaskError as error:
                reason = self._failed([], attempt, error)
                if attempt == self.config.resources.sample_attempts:
                    raise OpdlmError(
                        f"weights of version {handle.version} failed to load {attempt} times "
                        f"(resources.sample_attempts): {reason}"
                    ) from error
                attempt += 1

    async def _published_again(self, lost: WeightHandle, error: WeightsLost) -> WeightHandle | None:
        """The version again, or a later one, once a restarted learner has come to it; None when the learner has ended.

        It trains its rounds up to there again with the samples that the queue has kept. Samples that died with its node
        must be made first, by an actor that has the version: so after a while `lost` is tried once more.
        """
        limit = self.config.resources.call_timeout_seconds
        since = self._lost_since.setdefault(lost.version, time.monotonic())
        log.warning("%s; waiting for the learner to publish them again", self._failed([], 1, error))
        try:
            async with asyncio.timeout(min(_LOST_PAUSE_SECONDS, limit)):
                again: WeightHandle | None = await self.roles.queue.weights_again.remote(lost)
        except TimeoutError:
            if time.monotonic() - since < limit:
                return lost
            raise OpdlmError(
                f"{last_line(error)}; not published again within {limit:g} s (rollout.weight_transport, "
                "resources.call_timeout_seconds)"
            ) from error
        self._lost_since.pop(lost.version, None)
        if again is not None and self.weights is not None and again.version == self.weights.version:
            self.weights = again
        return again

    async def _watch(self, tell: Callable[[list[dict[str, Any]], dict[str, Any]], None]) -> None:
        heard, limit = time.monotonic(), self.config.resources.call_timeout_seconds
        while (events := await self.roles.queue.drain_events.remote(min(_HEARTBEAT_SECONDS, limit))) is not None:
            state = await self.roles.queue.state.remote()
            waits = state.pop("learner_waits")
            self._keeper.committed(state.pop("committed_rounds"))
            if events:
                tell(events, state | self.roles.sizes())
            if events or waits:
                heard = time.monotonic()
            elif time.monotonic() - heard > limit:
                raise LearnerSilent(f"learner: it neither trains nor waits for samples since {limit:g} s {_LIMIT}")
