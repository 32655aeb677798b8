"""A pool of equal actors: a call goes to a free one, and actors may die, be restarted, be added and be retired.

    free ──call──► busy ──answer──► free
                    └──death──► starting ──answers `ready`──► free
                                  └──has no restart left──► gone

Ray restarts an actor that dies (`max_restarts`). The pool sends the call that died with it to another actor, so that no
caller waits for a node that may never come back. A restarted actor gets calls only after it has answered `ready`. A
call may run twice; the methods of pooled actors must allow that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from opdlm.common.errors import OpdlmError, first_line, last_line

log = logging.getLogger("opdlm.pool")

_LONGEST_PAUSE_SECONDS = 5.0

DEATHS = (
    RayActorError,
    NodeDiedError,
    OutOfMemoryError,  # Ray's memory monitor killed it
    ActorUnschedulableError,
    ActorPlacementGroupRemoved,
    RuntimeEnvSetupError,
)
"""The errors by which Ray reports that an actor is dead; not all of them are a `RayActorError`."""

OnAnswer = Callable[[str, str, float], None]
"""Called after each answer with the actor's name, the method and the seconds of the call."""
OnDeath = Callable[[str, str], None]
"""Called after each death with the actor's name and the reason."""


class ActorPool:
    """Sends calls to actors, one call per actor at a time. Each actor has a method `ready()`.

    Args:
        actors: handles by name.
        timeout_seconds: longest wait for one answer, or for any actor to be ready; then an error names the actors.
        restarts: how often Ray restarts each actor; only for the error text.
    """

    def __init__(self, actors: dict[str, Any], timeout_seconds: float, restarts: int) -> None:
        self.actors = dict(actors)
        """Handles by name, of actors that are ready and of actors that are starting or restarting."""
        self.timeout_seconds = timeout_seconds
        self.restarts = restarts
        self.on_death: OnDeath = lambda name, reason: log.warning("%s died: %s", name, reason)
        self.on_answer: OnAnswer = lambda name, method, seconds: None
        self._free: asyncio.Queue[str | None] = asyncio.Queue()
        """Names of free actors; None wakes a waiting call so that it finds `_none_left`."""
        self._queued: set[str] = set()
        """Names in `_free`. An actor that died while it was free, and came back, must not be in the queue twice."""
        self._starting: dict[str, asyncio.Task[None]] = {}
        """By name, for actors that are not ready: the task that waits until the actor answers `ready`."""
        self._idle: dict[str, asyncio.Event] = {}
        """By name: set while the actor is in no call."""
        self._lives: dict[str, int] = {}
        """By name, how often the actor died."""
        self._none_left: OpdlmError | None = None
        for name in actors:
            self._mark_free(name)

    @property
    def serving(self) -> int:
        """Number of actors that are ready."""
        return len(self.actors.keys() - self._starting.keys())

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
        while True:
            name = await self._next_free()
            started, life = time.perf_counter(), self._lives.get(name, 0)
            try:
                refs = getattr(self.actors[name], method).options(num_returns=outputs + 1).remote(*args)
                *kept, small = refs if outputs else [refs]
                answer = await self._await_answer(small, f"{name}.{method}")
            except BaseException as error:
                if not _is_death(error):
                    self._mark_free(name)
                    raise
                self._mark_dead(name, life, error)
                continue
            self.on_answer(name, method, time.perf_counter() - started)
            self._mark_free(name)
            return kept, answer

    async def fetch(self, method: str, *args: Any, outputs: int) -> tuple[list[Any], Any]:
        """Like `call`, but returns the outputs themselves; runs the method again if they are lost with a node."""
        while True:
            refs, small = await self.call(method, *args, outputs=outputs)
            try:
                return [await self._await_answer(ref, f"an output of {method}") for ref in refs], small
            except ObjectLostError as error:
                log.warning("an output of %s is lost, so the call is repeated: %s", method, first_line(error))

    async def broadcast(self, method: str, *args: Any) -> None:
        """Runs a method on every ready actor, after the call that the actor is busy with; waits for all answers.

        An actor that dies meanwhile is left out.

        Raises:
            OpdlmError: no answer in time.
            RayError: whatever the method raised, unchanged.
        """

        async def on(name: str, actor: Any) -> None:
            life = self._lives.get(name, 0)
            try:
                await self._await_answer(getattr(actor, method).remote(*args), f"{name}.{method}")
            except RayError as error:
                if not _is_death(error):
                    raise
                self._mark_dead(name, life, error)

        ready = {name: actor for name, actor in self.actors.items() if name not in self._starting}
        await asyncio.gather(*(on(name, actor) for name, actor in ready.items()))

    def add(self, name: str, actor: Any) -> None:
        """Adds a new actor, which gets calls once it is ready. A name must not have been used before."""
        self.actors[name] = actor
        self._none_left = None
        self._starting[name] = asyncio.create_task(self._wait_until_ready(name))

    async def retire(self, name: str) -> None:
        """Takes an actor out of the pool and ends it, after the call that it is busy with."""
        actor = self.actors.pop(name)
        if starting := self._starting.pop(name, None):
            starting.cancel()
        else:
            await self._idle[name].wait()
        stop_actors([actor])

    # --- states of an actor -------------------------------------------------------------------------------------

    def _mark_free(self, name: str) -> None:
        """Queues an actor for the next call, unless it is retired, starting or queued already."""
        self._idle.setdefault(name, asyncio.Event()).set()
        if name in self.actors and name not in self._starting and name not in self._queued:
            self._queued.add(name)
            self._free.put_nowait(name)

    async def _next_free(self) -> str:
        """Waits for a free actor, takes it out of the queue and returns its name."""
        while True:
            try:
                name = await asyncio.wait_for(self._free.get(), self.timeout_seconds)
            except TimeoutError:
                if self.serving:
                    continue  # ready actors are busy, and each of their calls has a time limit of its own
                raise OpdlmError(
                    f"{', '.join(self.actors)}: none was ready within {self.timeout_seconds:g} s "
                    "(resources.call_timeout_seconds); does the cluster still have room for an actor?"
                ) from None
            if self._none_left is not None:
                self._free.put_nowait(None)
                raise self._none_left
            if name is None:
                continue
            self._queued.remove(name)
            if name in self.actors and name not in self._starting:
                self._idle[name].clear()
                return name

    def _mark_dead(self, name: str, life: int, error: BaseException) -> None:
        """Notes that an actor died, and begins to wait for Ray's restart of it.

        `life`: how often the actor had died before the call. All calls that were open die with it, one after another,
        some perhaps when the actor is back already.
        """
        if life != self._lives.get(name, 0):
            return  # this death was told by another call
        self._idle[name].set()
        if name not in self.actors or name in self._starting:
            return  # it is retired, or dies again before it was ready
        self._lives[name] = life + 1
        self.on_death(name, _reason(error))
        self._starting[name] = asyncio.create_task(self._wait_until_ready(name))

    async def _wait_until_ready(self, name: str) -> None:
        """Asks a starting actor for `ready` until it answers or is dead for good."""
        pause = 0.1
        while True:
            try:
                await self.actors[name].ready.remote()
            except ActorUnavailableError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except RayError as error:
                self._remove(name, error)
                return
            else:
                del self._starting[name]
                self._mark_free(name)
                return

    def _remove(self, name: str, error: Exception) -> None:
        """Takes out an actor that has no restart left; if it was the last, all calls fail until one is added."""
        del self.actors[name], self._starting[name]
        if _could_not_begin(error):
            end = f"{name}: {last_line(error).partition('OpdlmError: ')[2] or last_line(error)}"
        else:
            end = (
                f"{name}: died more often than resources.actor_restarts {self.restarts} allows, and no other actor of "
                f"its kind is left: {first_line(error)}"
            )
        log.warning("%s has no restart left: %s; %d actors remain", name, _reason(error), len(self.actors))
        if not self.actors:
            self._none_left = OpdlmError(end)
            self._free.put_nowait(None)

    async def _await_answer(self, ref: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(value_of(ref), self.timeout_seconds)
        except (TimeoutError, GetTimeoutError):
            raise OpdlmError(
                f"{what}: no answer in {self.timeout_seconds:g} s (resources.call_timeout_seconds); "
                "is the cluster alive, and is the limit long enough for one call?"
            ) from None
        except RaySystemError as error:
            raise OpdlmError(f"{what}: {first_line(error)}") from error


def _is_death(error: BaseException) -> bool:
    """Whether the error of a call means that the called actor is dead.

    A `RayTaskError` comes from a living actor, even if it holds the error of another actor's death.
    """
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def _could_not_begin(error: BaseException) -> bool:
    """Whether the actor's constructor raised. Ray does not restart such an actor; the error's last line says why."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def _reason(error: BaseException) -> str:
    return last_line(error) if _could_not_begin(error) else first_line(error)


async def value_of(ref: Any) -> Any:
    """The value of an object reference, as a coroutine: `asyncio.wait_for` takes no reference."""
    return await ref


def stop_actors(actors: list[Any]) -> None:
    """Kills actors that this run started; Ray does not restart them."""
    for actor in actors:
        ray.kill(actor)
