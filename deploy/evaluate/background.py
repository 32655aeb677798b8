"""Periodic evaluations beside the run: spare actors evaluate a weight version while decoding and training go on.

Evaluations run one at a time, in the order of the versions, and none is left out: a version that arrives during an
evaluation waits. At most `MOST_WAITING` versions wait, because each keeps a whole weight pack alive in the object
store. The next push then waits for a place, so a run whose evaluations are slower than its rounds goes at their pace
and does not fill the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from opdlm.common.errors import OpdlmError, WeightsLost, last_line
from opdlm.common.types import WeightHandle

MOST_WAITING = 2
"""Versions that may wait while one is evaluated."""


class BackgroundEvaluations:
    """A queue of evaluations.

    Args:
        evaluate: evaluates one version. The handle that it gets keeps the version's weights alive.
        lost: called for a version whose weights died before they were evaluated. The curve has a gap there.
    """

    def __init__(
        self,
        evaluate: Callable[[WeightHandle], Awaitable[None]],
        lost: Callable[[WeightHandle, WeightsLost], None],
    ) -> None:
        self._evaluate, self._lost = evaluate, lost
        self._places = asyncio.Semaphore(MOST_WAITING + 1)
        self._one_at_a_time = asyncio.Lock()  # first come, first served
        self._tasks: list[asyncio.Task[None]] = []

    async def submit(self, handle: WeightHandle) -> None:
        """Adds a version; waits only where the queue is full. Raises `OpdlmError` if an earlier evaluation failed."""
        await self._places.acquire()
        try:
            self._raise_failure()
        except Exception:
            self._places.release()
            raise
        self._tasks.append(asyncio.create_task(self._run(handle)))

    async def finish(self) -> None:
        """Waits for all evaluations. Raises `OpdlmError` if one of them failed."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._raise_failure()

    def drop(self) -> None:
        """Cancels all evaluations: the weights that they need are gone."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def _run(self, handle: WeightHandle) -> None:
        try:
            async with self._one_at_a_time:
                self._raise_failure()  # a failed evaluation ends the run, so later ones do not start
                await self._evaluate(handle)
        except WeightsLost as error:
            self._lost(handle, error)
        finally:
            self._places.release()

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise OpdlmError(f"an evaluation beside the run failed: {last_line(error)}") from error
