"""A pool of equal actors: a call goes to a free one, and actors may die, be restarted, be added and be retired.

Besides such calls, which an actor gets one at a time, a caller may work with one actor for long (`ready_names`, `hold`,
`call_on`), as the driver does that deals requests to rollout actors (`deploy/run/dealing.py`).

    free ──call──► busy ──answer──► free
                    └──death──► starting ──answers `ready`──► free
                                  └──has no restart left──► gone

The pool sends a call that died with its actor to another actor, so that no caller waits for a node that may never come
back. A call may run twice; the methods of pooled actors must allow that. The life of an actor is in `members.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ObjectLostError

from opdlm.actors.members import ActorGone, Members
from opdlm.common.errors import first_line

log = logging.getLogger("opdlm.pool")

OnAnswer = Callable[[str, str, float], None]
"""Called after each answer with the actor's name, the method and the seconds of the call."""


class ActorPool(Members):
    """Sends calls to actors, one call per actor at a time. Its arguments are those of `Members`."""

    def __init__(self, actors: dict[str, Any], timeout_seconds: float, restarts: int) -> None:
        super().__init__(actors, timeout_seconds, restarts)
        self.on_answer: OnAnswer = lambda name, method, seconds: None
        self._free: asyncio.Queue[str | None] = asyncio.Queue()
        """Names of free actors; None wakes a waiting call so that it finds `_none_left`."""
        self._queued: set[str] = set()
        """Names in `_free`. An actor that died while it was free, and came back, must not be in the queue twice."""
        for name in actors:
            self._mark_free(name)

    async def call(self, method: str, *args: Any, outputs: int = 0) -> tuple[list[Any], Any]:
        """Waits for a free actor and runs a method on it; runs the method on another actor if that one dies meanwhile.

        Args:
            outputs: number of return values to leave in the object store; the method returns them before a last, small
                value.

        Returns: (references to the outputs, the small value).

        Raises:
            OpdlmError: no answer in time, or no actor is left.
            RayError: whatever the method raised, unchanged.
        """
        answer = await self.call_late(method, lambda: (args, outputs))
        assert answer is not None, "there are arguments"
        return answer

    async def call_late(
        self, method: str, arguments: Callable[[], tuple[tuple[Any, ...], int] | None]
    ) -> tuple[list[Any], Any] | None:
        """Like `call`, but asks for `(args, outputs)` only once an actor is free; no call is made if there are none."""
        chosen = None
        while True:
            name = await self._next_free()
            try:
                if (chosen := chosen or arguments()) is None:
                    return None
                started = time.perf_counter()
                answer = await self.call_on(name, method, *chosen[0], outputs=chosen[1])
                self.on_answer(name, method, time.perf_counter() - started)
                return answer
            except ActorGone:
                continue
            finally:
                self._mark_free(name)

    async def fetch(self, method: str, *args: Any, outputs: int) -> tuple[list[Any], Any]:
        """Like `call`, but returns the outputs themselves; runs the method again if they are lost with a node."""
        while True:
            refs, small = await self.call(method, *args, outputs=outputs)
            try:
                return [await self._await_answer(ref, f"an output of {method}") for ref in refs], small
            except ObjectLostError as error:
                log.warning("an output of %s is lost, so the call is repeated: %s", method, first_line(error))

    # --- states of an actor -------------------------------------------------------------------------------------

    def _mark_free(self, name: str) -> None:
        """Queues an actor for the next call, unless it is retired, starting or queued already."""
        if name in self.actors and name not in self._starting and name not in self._queued:
            self._queued.add(name)
            self._free.put_nowait(name)

    def _became_ready(self, name: str) -> None:
        self._mark_free(name)

    def _nobody_left(self) -> None:
        self._free.put_nowait(None)

    async def _next_free(self) -> str:
        """Waits for a free actor, takes it out of the queue and returns its name."""
        while True:
            try:
                async with asyncio.timeout(self.timeout_seconds):
                    name = await self._free.get()
            except TimeoutError:
                if self.serving:
                    continue  # ready actors are busy, and each of their calls has a time limit of its own
                raise self._none_in_time() from None
            if self._none_left is not None:
                self._free.put_nowait(None)
                raise self._none_left
            if name is None:
                continue
            self._queued.remove(name)
            if name in self.actors and name not in self._starting:
                return name
