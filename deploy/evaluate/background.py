"""Periodic evaluations beside the run: spare actors evaluate a weight version while decoding and training go on.

One at a time, in the order of the versions, and every one is done: a version that comes meanwhile waits. At most
`MOST_WAITING` wait, because each keeps a whole weight pack alive in the object store; the next push then waits for a
place (back-pressure), so a run whose evaluations are slower than its rounds goes at their pace instead of filling the
store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from opdlm.common.errors import WeightsLost
from opdlm.common.types import WeightHandle

MOST_WAITING = 2
"""Versions that wait for the one in work."""


class BackgroundEvaluations:
    """A line of evaluations. `evaluate` does one; the handle that it is given keeps the version's weights alive.

    `lost` is told of a version whose weights died before they were evaluated: the curve then has a gap there.
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
        """Puts a version in line; waits only where the line is full. Raises what an earlier evaluation raised."""
        await self._places.acquire()
        self._raise_failure()
        self._tasks.append(asyncio.create_task(self._run(handle)))

    async def finish(self) -> None:
        """Waits for all of them. Raises what one of them raised."""
        await asyncio.gather(*self._tasks)

    def drop(self) -> None:
        """Ends all of them: the weights that they need are gone."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def _run(self, handle: WeightHandle) -> None:
        try:
            async with self._one_at_a_time:
                self._raise_failure()  # one that failed ends the run: those behind it are not begun
                await self._evaluate(handle)
        except WeightsLost as error:
            self._lost(handle, error)
        finally:
            self._places.release()

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
