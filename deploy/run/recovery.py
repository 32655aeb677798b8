"""A run outlives its replay queue. A life is one queue, one worker group, one set of loops.

The queue's process holds the ledger of what is decoded and not yet in a checkpoint. Where it dies, the run goes back to
its last checkpoint, as `--resume` would, within the same driver: the rollout and teacher actors keep their models, and
take up work again once the learner has published the checkpoint's weights.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from opdlm.actors.pool import stop_actors, value_of
from opdlm.actors.queue.actor import NAME, start_queue
from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError, first_line
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords

log = logging.getLogger("opdlm.lives")

_PATIENCE_SECONDS = 60.0
"""For an answer of the queue, which is never busy."""


async def survive_queue_deaths(
    config: OpdlmConfig,
    roles: Roles,
    total: int,
    telemetry: RunRecords,
    live: Callable[[], Awaitable[None]],
    stopped: Callable[[], bool],
) -> None:
    """Awaits `live()`, and again with a new queue in `roles` each time that the queue has died.

    Args:
        total: samples in the run.
        stopped: whether an end was asked for; then the last checkpoint is where `--resume` goes on.

    Raises:
        OpdlmError: the queue died more often than `resources.actor_restarts`; or whatever `live` raised, the queue
            being alive.
    """
    for deaths in itertools.count(1):
        try:
            await live()
            return
        except Exception as error:
            reason = await _death_of(roles.queue)
            if reason is None:
                raise
            log.warning("replay-queue died (%s): %s", reason, error)
        telemetry.queue_died(reason)
        if stopped():
            return
        if deaths > config.resources.actor_restarts:
            raise OpdlmError(
                f"replay-queue: died more often than resources.actor_restarts {config.resources.actor_restarts} "
                f"allows: {reason}; go on from the last checkpoint with --resume"
            )
        checkpoint = latest_checkpoint(Path(config.run.dir) / "checkpoints")
        rollout, first_round = config.rollout, checkpoint.rounds if checkpoint else 0
        stop_actors([roles.queue])  # one that hangs is not dead yet; and Ray frees a dead one's name in its own time
        limits = (rollout.prompts_per_round, config.queue.max_staleness, total, first_round)
        roles.queue = start_queue(*limits, name=f"{NAME}-{deaths + 1}")
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
