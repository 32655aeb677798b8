"""The end of a run by itself after `run.max_minutes`, for runs that are made in parts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from ray.exceptions import RayActorError

from opdlm.deploy.run.loops import Loops


class TimeLimit:
    """Its time begins when it is made.

    Args:
        minutes: `run.max_minutes`; None: there is no limit.
        clock: seconds that only grow.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._clock, self._begun = minutes, clock, clock()
        self.over = False
        """Whether the run ends because its time is over."""

    async def watch(self, loops: Loops, rounds: int, say: Callable[[str], None]) -> None:
        """Ends these loops after the round in which the time is over. The last round ends the run anyway.

        Args:
            rounds: of the run.
            say: is told the line that the user reads.
        """
        if self.minutes is None:
            return
        await asyncio.sleep(max(60 * self.minutes - (self._clock() - self._begun), 0))
        if loops.stopping or loops.finishing:
            return
        with contextlib.suppress(RayActorError):  # the queue is dead: the next loops are watched again
            last = await loops.stop_after_round(rounds)
            if last < rounds and not self.over:
                self.over = True
                what = f"round {last} of {rounds} is finished, then a checkpoint is written"
                say(f"{self.minutes:g} minutes are over (run.max_minutes): {what}")
