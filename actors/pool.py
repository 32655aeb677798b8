"""A pool of equal actors: a call goes to a free one.

Ray itself restarts an actor that dies and repeats the call that died with it (`max_restarts`, `max_task_retries` of the
actors; their methods may be repeated). What reaches the pool is an actor that used up its restarts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError

from common.errors import OpdlmError

log = logging.getLogger("opdlm.pool")


class ActorPool:
    """Calls to actors that do one thing at a time.

    Args:
        actors: handles by name.
        timeout_seconds: longest wait for one answer; then the error names the actor and the call.
        restarts: how often each of them may die and come back; for the error.
    """

    def __init__(self, actors: dict[str, Any], timeout_seconds: float, restarts: int) -> None:
        self.actors = actors
        self.timeout_seconds = timeout_seconds
        self.restarts = restarts
        self._free: asyncio.Queue[str] = asyncio.Queue()
        for name in actors:
            self._free.put_nowait(name)

    async def call(self, method: str, *args: Any, outputs: int = 0) -> tuple[list[Any], Any]:
        """Runs a method on a free actor, waiting for one.

        Args:
            outputs: return values that stay where they are; the method returns them and then one small value.

        Returns: (references to the outputs, the small value).

        Raises:
            OpdlmError: no answer in time, or no actor is left.
        """
        while True:
            name = await self._take()
            try:
                refs = getattr(self.actors[name], method).options(num_returns=outputs + 1).remote(*args)
                *kept, small = refs if outputs else [refs]
                answer = await self._answer(small, f"{name}.{method}")
            except RayActorError as error:
                self._bury(name, error)
                continue
            finally:
                if name in self.actors:
                    self._free.put_nowait(name)
            return kept, answer

    async def broadcast(self, method: str, *args: Any) -> None:
        """Runs a method on every actor, behind what each is doing; waits for all."""

        async def on(name: str, actor: Any) -> None:
            try:
                await self._answer(getattr(actor, method).remote(*args), f"{name}.{method}")
            except RayActorError as error:
                self._bury(name, error)

        await asyncio.gather(*(on(name, actor) for name, actor in list(self.actors.items())))

    async def _take(self) -> str:
        while True:
            name = await self._free.get()
            if name in self.actors:
                return name

    def _bury(self, name: str, error: Exception) -> None:
        """An actor that used up its restarts leaves the pool; the others do its work."""
        self.actors.pop(name, None)
        log.warning("%s is gone for good: %s; %d of its kind are left", name, _first_line(error), len(self.actors))
        if not self.actors:
            raise OpdlmError(
                f"{name}: died more often than resources.actor_restarts {self.restarts} allows, and was the last of "
                f"its kind: {_first_line(error)}"
            ) from error

    async def _answer(self, ref: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(_value(ref), self.timeout_seconds)
        except (TimeoutError, GetTimeoutError):
            raise OpdlmError(
                f"{what}: no answer in {self.timeout_seconds:g} s (resources.call_timeout_seconds); "
                "is the cluster alive, and the time enough for one call?"
            ) from None
        except RaySystemError as error:
            raise OpdlmError(f"{what}: {_first_line(error)}") from error


async def _value(ref: Any) -> Any:
    return await ref


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def stop_actors(actors: list[Any]) -> None:
    """Ends actors that this run started."""
    for actor in actors:
        ray.kill(actor)
