"""What happens in a run when something dies, is lost or comes too late, so that `loops.py` need not show it.

a rollout actor dies                what it decoded is dealt again (`dealing.py`)
a teacher or reward actor dies      its call goes to another actor (`actors/pool.py`)
a call fails                        `Repetition` repeats it, `resources.sample_attempts` times in all
samples come too late for a round   `Repetition` has those of them made again with the newest weights
the object store is full            `Repetition` waits for room
published weights are lost          `Repetition` waits until the restarted learner publishes them again
a learner rank dies                 Ray Train restarts the group from its last checkpoint (`learner/group.py`)
the learner hangs                   `learner_events` raises `LearnerSilent`
a loop fails, or a stop is asked    the other loops end, and the learner saves (`ending.py`)
the replay queue dies               `survive_queue_deaths` goes back to the last checkpoint with a new queue
the newest checkpoint is damaged    `survive_queue_deaths` goes back to the one before it with a new queue
the driver dies                     `opdlm train --resume`
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError

from opdlm.actors.members import stop_actors, value_of
from opdlm.actors.queue.actor import NAME, start_queue
from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError, WeightsLost, first_line, last_line
from opdlm.common.retry import Attempts, StoreWait, store_is_full
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.learner.group import LearnerBehind

log = logging.getLogger("opdlm.recovery")

_HEARTBEAT_SECONDS = 10.0
"""Longest time between two signs of the driver's life to the learner."""
_PATIENCE_SECONDS = 60.0
"""Longest wait for an answer of the queue, which is never busy for long."""
_LOST_PAUSE_SECONDS = 10.0
"""Longest wait for lost weights before the call that needs them is tried again."""
_STALE_SHOWN = 5
"""Most indices in an error about stale samples."""
NO_SIGN = "(resources.call_timeout_seconds); is there room in the cluster for its ranks?"


class LearnerSilent(OpdlmError):
    """The learner hangs, so nothing waits for its end."""


class SamplesStale(OpdlmError):
    """The queue refused samples because the weights that decoded them are too old."""

    def __init__(self, indices: Sequence[int], version: int) -> None:
        shown = ", ".join(map(str, indices[:_STALE_SHOWN])) + (", ..." if len(indices) > _STALE_SHOWN else "")
        super().__init__(
            f"{len(indices)} samples ({shown}) were decoded with weights of version {version} or newer, too old for "
            "their rounds (queue.max_staleness)"
        )


class Repetition:
    """Repeats the calls of one set of loops until they succeed."""

    def __init__(self, config: OpdlmConfig, queue: Any, records: RunRecords) -> None:
        self._config, self._queue, self._records = config, queue, records
        self.weights: WeightHandle | None = None
        """The newest version that every rollout actor has loaded; None before the first one."""
        self._lost_since: dict[int, float] = {}
        """By weight version, when its data was first found lost."""
        self._failed: tuple[Exception, list[int]] | None = None
        """The error of a call that failed in this turn of the event loop, and its samples so far."""

    async def until_done(
        self,
        act: Callable[[WeightHandle], Awaitable[None]],
        weights: WeightHandle,
        what: str,
        indices: Sequence[int] = (),
    ) -> WeightHandle | None:
        """Awaits `act(weights)` until it succeeds.

        A failed score is an error and a retry, never zeros (METHOD.md section 3).

        Args:
            act: makes samples, loads or evaluates weights; it may run several times, later with newer weights.
            what: names the action in errors, as in `samples 0 to 7`.
            indices: samples that the action makes, for the records.

        Returns: the weights with which it succeeded; None when the learner ended while lost weights were waited for.

        Raises:
            OpdlmError: it failed `resources.sample_attempts` times, or waited `resources.call_timeout_seconds`.
            RayActorError: the queue died. (The pools handle the deaths of their own actors.)
        """
        resources = self._config.resources
        attempts, store = Attempts(what, resources.sample_attempts), StoreWait(resources.call_timeout_seconds)
        handle: WeightHandle | None = weights
        while handle is not None:
            try:
                await act(handle)
            except RayActorError:
                raise
            except WeightsLost as error:
                handle = await self._published_again(handle, error)
            except (RayError, SamplesStale) as error:
                self._note_failure(indices, attempts.failed + 1, error)
                if store_is_full(error):  # not the fault of the samples: the learner must let go of some first
                    await asyncio.sleep(store.pause(what))
                    continue
                attempts.note(error)
                if self.weights is not None and self.weights.version > handle.version:
                    handle = self.weights
            else:
                self._lost_since.pop(handle.version, None)
                return handle
        return None

    async def _published_again(self, lost: WeightHandle, error: WeightsLost) -> WeightHandle | None:
        """Waits until the learner publishes a lost version again, or a later one. None when the learner has ended.

        The restarted learner trains its rounds again, with the samples that the queue has kept. If samples died with
        the same node, an actor that still holds the lost version must make them first. So after a pause this returns
        `lost` itself, which is tried once more.
        """
        limit = self._config.resources.call_timeout_seconds
        since = self._lost_since.setdefault(lost.version, time.monotonic())
        log.warning("%s; waiting for the learner to publish them again", self._note_failure([], 1, error))
        try:
            async with asyncio.timeout(min(_LOST_PAUSE_SECONDS, limit)):
                again: WeightHandle | None = await self._queue.republished_weights.remote(lost)
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

    def _note_failure(self, indices: Sequence[int], attempt: int, error: Exception) -> str:
        """Records a failed call, once for all samples that fail with it; returns the error's line that says why."""
        reason = last_line(error)
        if self._failed is not None and self._failed[0] is error:
            self._failed[1].extend(indices)
        else:
            samples = list(indices)
            self._failed = error, samples
            asyncio.get_running_loop().call_soon(self._record_failure, samples, attempt, reason, type(error).__name__)
        return reason

    def _record_failure(self, samples: list[int], attempt: int, reason: str, kind: str) -> None:
        self._failed = None
        self._records.failed(samples, attempt, reason, kind)


async def learner_events(
    queue: Any, limit_seconds: float
) -> AsyncIterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yields the learner's events and the queue's state, at least every 10 seconds, until the learner has ended.

    Each request for events tells the queue that those of the request before were written.

    Raises:
        LearnerSilent: for `limit_seconds` the learner neither sent an event nor waited for samples.
    """
    heard = time.monotonic()
    while (events := await queue.take_events.remote(min(_HEARTBEAT_SECONDS, limit_seconds))) is not None:
        state = await queue.state.remote()
        waits = state.pop("learner_waits")
        yield events, state
        if events or waits:
            heard = time.monotonic()
        elif time.monotonic() - heard > limit_seconds:
            raise LearnerSilent(f"learner: it has not trained or waited for samples for {limit_seconds:g} s {NO_SIGN}")


async def survive_queue_deaths(
    config: OpdlmConfig,
    roles: Roles,
    total: int,
    records: RunRecords,
    run_loops: Callable[[], Awaitable[None]],
    stop_asked: Callable[[], bool],
) -> None:
    """Awaits `run_loops()`, and again with a new queue in `roles` each time that the queue dies or is of no use.

    The queue's process holds the ledger of what is decoded and not yet in a checkpoint. When it dies, the run goes back
    to its last checkpoint, as `--resume` would, within the same driver: the rollout and teacher actors keep their
    models, and work again once the learner has published the checkpoint's weights. The same happens when a restarted
    learner finds the newest checkpoint damaged: the queue has let go of the samples since the one before it.

    Args:
        total: samples in the run.

    Raises:
        OpdlmError: this happened more often than `resources.actor_restarts` allows, or no checkpoint is whole.
        Exception: whatever `run_loops` raised while the queue was alive.
    """
    for times in itertools.count(1):
        try:
            await run_loops()
            return
        except LearnerBehind as error:
            records.went_back(reason := str(error))
            what = "checkpoints: damaged"
        except Exception as error:
            death = await _death_of(roles.queue)
            if death is None:
                raise
            log.info("replay-queue died (%s): %s", death, error)  # the view tells it: `queue_died`
            records.queue_died(reason := death)
            what = "replay-queue: died"
        if stop_asked():
            return
        if times > config.resources.actor_restarts:
            raise OpdlmError(
                f"{what} more often than resources.actor_restarts {config.resources.actor_restarts} "
                f"allows: {reason}; go on from the last checkpoint with --resume"
            )
        checkpoint = latest_checkpoint(Path(config.run.dir) / "checkpoints")
        first_round = checkpoint.rounds if checkpoint else 0
        stop_actors([roles.queue])  # a queue that hangs is not dead yet, and Ray frees a dead one's name late
        limits = (config.rollout.samples_per_round, config.queue.max_staleness, total, first_round)
        roles.queue = start_queue(*limits, config.rollout.responses_per_prompt, name=f"{NAME}-{times + 1}")
        for pool in (roles.rollouts, roles.evaluators):
            if pool is not None:
                await pool.broadcast("forget_weights")


async def _death_of(queue: Any) -> str | None:
    """Why the queue is dead; None if it answers."""
    try:
        await asyncio.wait_for(value_of(queue.state.remote()), _PATIENCE_SECONDS)
    except RayActorError as error:
        return first_line(error)
    except TimeoutError:
        return f"no answer in {_PATIENCE_SECONDS:g} s"
    return None
