"""A pool of equal actors: a call goes to a free one, and again to another if that one dies under it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError

from common.errors import OpdlmError


class ActorPool:
    """Calls to actors that do one thing at a time.

    Args:
        actors: handles by name.
        timeout_seconds: longest wait for one answer; then the error names the actor and the call.
        retries: how often a call may be repeated because its actor died.
    """

    def __init__(self, actors: dict[str, Any], timeout_seconds: float, retries: int) -> None:
        self.actors = actors
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.busy_seconds = 0.0
        """Seconds of finished calls, summed over actors."""
        self.deaths = 0
        """Calls repeated because their actor died."""
        self._free: asyncio.Queue[str] = asyncio.Queue()
        for name in actors:
            self._free.put_nowait(name)

    async def call(self, method: str, *args: Any, outputs: int = 0) -> tuple[list[Any], Any]:
        """Runs a method on a free actor, waiting for one.

        Args:
            outputs: return values that stay where they are; the method returns them and then one small value.

        Returns: (references to the outputs, the small value).

        Raises:
            OpdlmError: no answer in time, or the actors died more often than `retries`.
        """
        for attempt in range(self.retries + 1):
            chosen = await self._free.get()
            started = time.perf_counter()
            try:
                refs = getattr(self.actors[chosen], method).options(num_returns=outputs + 1).remote(*args)
                *kept, small = refs if outputs else [refs]
                return kept, await self._answer(small, f"{chosen}.{method}")
            except RayActorError as error:
                self.deaths += 1
                if attempt == self.retries:
                    raise OpdlmError(
                        f"{chosen}.{method}: the actor died {attempt + 1} times under this call "
                        f"(resources.actor_restarts {self.retries}): {_first_line(error)}"
                    ) from error
            finally:
                self.busy_seconds += time.perf_counter() - started
                self._free.put_nowait(chosen)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Runs a method on every actor, behind what each is doing; waits for all."""
        calls = [
            self._answer(getattr(actor, method).remote(*args), f"{name}.{method}")
            for name, actor in self.actors.items()
        ]
        return await asyncio.gather(*calls)

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
