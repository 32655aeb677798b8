"""A pool of equal actors: a call goes to a free one, and actors may die, come back, be added and be taken away.

    free ──call──► busy ──answer──► free
                    └──death──► away ──answers `ready` again──► free
                                  └──used up its restarts──► gone

Ray restarts an actor that dies (`max_restarts`); the call that died with it goes to another one here, so that nobody
waits for a node that may not come back. A restarted actor gets work only after it answered. Calls may run twice;
methods of pooled actors must allow that.
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

from opdlm.common.errors import OpdlmError, first_line

log = logging.getLogger("opdlm.pool")

_LONGEST_PAUSE_SECONDS = 5.0

DEATHS = (
    RayActorError,
    NodeDiedError,
    OutOfMemoryError,  # Ray's memory monitor ended it
    ActorUnschedulableError,
    ActorPlacementGroupRemoved,
    RuntimeEnvSetupError,
)
"""How Ray says that an actor is dead, of which it has more kinds than `RayActorError`."""

OnAnswer = Callable[[str, str, float], None]
"""Actor, method, seconds."""
OnDeath = Callable[[str, str], None]
"""Told the actor's name and why, each time that one dies."""


class ActorPool:
    """Calls to actors that do one thing at a time and answer `ready()`.

    Args:
        actors: handles by name.
        timeout_seconds: longest wait for one answer, or for any actor to come back; then the error says for whom.
        restarts: how often each of them may die and come back; for the error.
    """

    def __init__(self, actors: dict[str, Any], timeout_seconds: float, restarts: int) -> None:
        self.actors = dict(actors)
        """Those that serve, and those that are on their way (back)."""
        self.timeout_seconds = timeout_seconds
        self.restarts = restarts
        self.on_death: OnDeath = lambda name, reason: None
        self.on_answer: OnAnswer = lambda name, method, seconds: None
        self._free: asyncio.Queue[str | None] = asyncio.Queue()  # None wakes whoever waits, to see that all are gone
        self._in_line: set[str] = set()
        """Names in `_free`: one that died there and came back is not to stand in it twice."""
        self._away: dict[str, asyncio.Task[None]] = {}
        self._idle: dict[str, asyncio.Event] = {}
        self._all_gone: OpdlmError | None = None
        for name in actors:
            self._serve(name)

    @property
    def serving(self) -> int:
        """Actors that can work now."""
        return len(self.actors.keys() - self._away.keys())

    async def call(self, method: str, *args: Any, outputs: int = 0) -> tuple[list[Any], Any]:
        """Runs a method on a free actor, waiting for one; on another one where the first dies meanwhile.

        Args:
            outputs: return values that stay where they are; the method returns them and then one small value.

        Returns: (references to the outputs, the small value).

        Raises:
            OpdlmError: no answer in time, or no actor is left.
        """
        while True:
            name = await self._take()
            started = time.perf_counter()
            try:
                refs = getattr(self.actors[name], method).options(num_returns=outputs + 1).remote(*args)
                *kept, small = refs if outputs else [refs]
                answer = await self._answer(small, f"{name}.{method}")
            except BaseException as error:
                if not _is_death(error):
                    self._serve(name)
                    raise
                self._lose(name, error)
                continue
            self.on_answer(name, method, time.perf_counter() - started)
            self._serve(name)
            return kept, answer

    async def fetch(self, method: str, *args: Any, outputs: int) -> tuple[list[Any], Any]:
        """As `call`, with the outputs themselves; the method runs again where they died with a node on the way."""
        while True:
            refs, small = await self.call(method, *args, outputs=outputs)
            try:
                return [await self._answer(ref, f"an output of {method}") for ref in refs], small
            except ObjectLostError as error:
                log.warning("an output of %s is lost, it is made again: %s", method, first_line(error))

    async def broadcast(self, method: str, *args: Any) -> None:
        """Runs a method on every actor that is there, behind what each is doing; waits for all of them."""

        async def on(name: str, actor: Any) -> None:
            try:
                await self._answer(getattr(actor, method).remote(*args), f"{name}.{method}")
            except RayError as error:
                if not _is_death(error):
                    raise
                self._lose(name, error)

        there = {name: actor for name, actor in self.actors.items() if name not in self._away}
        await asyncio.gather(*(on(name, actor) for name, actor in there.items()))

    def add(self, name: str, actor: Any) -> None:
        """A new actor; it gets work once it is ready. A name is used once."""
        self.actors[name] = actor
        self._all_gone = None
        self._away[name] = asyncio.create_task(self._come_back(name))

    async def retire(self, name: str) -> None:
        """Takes an actor away for good, after the call that it is busy with."""
        actor = self.actors.pop(name)
        if coming := self._away.pop(name, None):
            coming.cancel()
        else:
            await self._idle[name].wait()
        stop_actors([actor])

    # --- states of an actor -------------------------------------------------------------------------------------

    def _serve(self, name: str) -> None:
        """It is free."""
        self._idle.setdefault(name, asyncio.Event()).set()
        if name in self.actors and name not in self._away and name not in self._in_line:
            self._in_line.add(name)
            self._free.put_nowait(name)

    async def _take(self) -> str:
        while True:
            try:
                name = await asyncio.wait_for(self._free.get(), self.timeout_seconds)
            except TimeoutError:
                if self.serving:
                    continue  # some are busy, each with a time limit of its own
                raise OpdlmError(
                    f"{', '.join(self.actors)}: not back after {self.timeout_seconds:g} s "
                    "(resources.call_timeout_seconds); does the cluster still have room for one?"
                ) from None
            if self._all_gone is not None:
                self._free.put_nowait(None)
                raise self._all_gone
            if name is None:
                continue
            self._in_line.remove(name)
            if name in self.actors and name not in self._away:
                self._idle[name].clear()
                return name

    def _lose(self, name: str, error: BaseException) -> None:
        """It died. Ray may be bringing it back."""
        self._idle[name].set()
        if name not in self.actors or name in self._away:
            return  # retired, or known already
        reason = first_line(error)
        log.warning("%s died: %s", name, reason)
        self.on_death(name, reason)
        self._away[name] = asyncio.create_task(self._come_back(name))

    async def _come_back(self, name: str) -> None:
        pause = 0.1
        while True:
            try:
                await self.actors[name].ready.remote()
            except ActorUnavailableError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except RayError as error:
                self._bury(name, error)
                return
            else:
                del self._away[name]
                self._serve(name)
                return

    def _bury(self, name: str, error: Exception) -> None:
        """An actor that used up its restarts leaves the pool; the others do its work."""
        del self.actors[name], self._away[name]
        log.warning("%s is gone for good: %s; %d of its kind are left", name, first_line(error), len(self.actors))
        if not self.actors:
            self._all_gone = OpdlmError(
                f"{name}: died more often than resources.actor_restarts {self.restarts} allows, and was the last of "
                f"its kind: {first_line(error)}"
            )
            self._free.put_nowait(None)

    async def _answer(self, ref: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(value_of(ref), self.timeout_seconds)
        except (TimeoutError, GetTimeoutError):
            raise OpdlmError(
                f"{what}: no answer in {self.timeout_seconds:g} s (resources.call_timeout_seconds); "
                "is the cluster alive, and the time enough for one call?"
            ) from None
        except RaySystemError as error:
            raise OpdlmError(f"{what}: {first_line(error)}") from error


def _is_death(error: BaseException) -> bool:
    """Whether an actor's answer says that it is dead; a living one may tell of another that is."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


async def value_of(ref: Any) -> Any:
    """What a reference stands for; a coroutine, for `asyncio.wait_for`."""
    return await ref


def stop_actors(actors: list[Any]) -> None:
    """Ends actors that this run started."""
    for actor in actors:
        ray.kill(actor)
