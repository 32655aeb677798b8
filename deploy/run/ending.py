"""How the loops of a run and its learner end together, whichever of them ends first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError

from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.recovery import NO_SIGN, LearnerSilent, learner_events
from opdlm.deploy.run.stop import LEARNER_THREAD

log = logging.getLogger("opdlm.ending")


async def run_together(loops: Loops, learn: Callable[[], None]) -> None:
    """Runs the loops until the learner has ended. If a loop fails first, the learner is told to save and end.

    Args:
        learn: runs the learner to its end; it blocks, so it runs in a thread of its own.

    Raises:
        Exception: what a loop or the learner raised first.
    """
    queue: Any = loops.roles.queue
    making = [asyncio.create_task(loops.produce()), asyncio.create_task(loops.push())]
    recording = asyncio.create_task(loops.record())
    recording.add_done_callback(lambda _: queue.driver_stops_listening.remote())
    learner = in_daemon_thread(learn)
    learner.add_done_callback(lambda _: queue.learner_ended.remote())
    tasks = [*making, recording]
    all_loops: asyncio.Future[Any] = asyncio.gather(*tasks)  # ends before the learner only if a loop fails
    ends: list[asyncio.Future[Any]] = [learner, all_loops]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not learner.done() and not isinstance(all_loops.exception(), LearnerSilent):
        with contextlib.suppress(RayActorError):  # the queue is dead: the learner notices that by itself
            await loops.stop()
        await _wait_for_learner(learner, recording, queue, loops.config.resources.call_timeout_seconds)
    # After a stop, nobody needs what is still being decoded or pushed, and where training has ended early, nobody needs
    # what is being decoded. Otherwise these loops end by themselves.
    failed = all_loops.done() or learner.exception()
    for task in tasks if failed else making if loops.stopping else making[:1] if loops.finishing else []:
        task.cancel()
    ended = [learner] if learner.done() else []
    for error in await asyncio.gather(all_loops, *tasks, *ended, return_exceptions=True):
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Exception):
            raise error


async def _wait_for_learner(
    learner: asyncio.Future[Any], recording: asyncio.Task[None], queue: Any, limit_seconds: float
) -> None:
    """After a loop failed: waits for the learner, which was told to stop, to end, as long as it sends events."""
    if recording.done():
        recording = asyncio.create_task(_take_events(queue, limit_seconds))
    await asyncio.wait([learner, recording], return_when=asyncio.FIRST_COMPLETED)
    if not recording.done():
        return
    reason = str(recording.exception())
    if not isinstance(recording.exception(), LearnerSilent):  # the learner has just ended, or the queue is dead
        await asyncio.wait([learner], timeout=limit_seconds)
        reason = f"learner: it has not ended within {limit_seconds:g} s of the replay queue's death {NO_SIGN}"
    if not learner.done():
        log.error("the run ends without a last checkpoint: %s", reason)


async def _take_events(queue: Any, limit_seconds: float) -> None:
    """Takes the learner's events in place of a recorder that failed, so that the learner does not wait for it."""
    async for _ in learner_events(queue, limit_seconds):
        continue


def in_daemon_thread(function: Callable[[], None]) -> asyncio.Future[None]:
    """Runs a blocking function in a thread that does not delay the end of the process.

    The threads of `asyncio.to_thread` are joined at the end, so a second Ctrl-C would wait for the whole call.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if not future.done():
            future.set_result(None) if error is None else future.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            function()
        except Exception as caught:  # raised where the future is awaited
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name=LEARNER_THREAD, daemon=True).start()
    return future
