"""Actors that may die, be restarted, be added and be retired, and calls to one of them.

    ready ──death──► starting ──answers `ready`──► ready
                        └──has no restart left──► gone

Ray restarts an actor that dies (`max_restarts`). A restarted actor counts as ready only after it has answered `ready`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
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

OnDeath = Callable[[str, str], None]
"""Called after each death with the actor's name and the reason."""


class ActorGone(Exception):
    """A call found its actor dead; the pool knows."""


class Members:
    """A set of equal actors. Each has a method `ready()`.

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
        self.on_change: Callable[[], None] = lambda: None
        """Called when an actor has become ready, has died or is being retired."""
        self._ready_again = asyncio.Event()
        """Set and replaced when an actor becomes ready, or when none is left."""
        self._starting: dict[str, asyncio.Task[None]] = {}
        """By name, for actors that are not ready: the task that waits until the actor answers `ready`."""
        self._users: Counter[str] = Counter()
        """By name, how many calls and blocks of `hold` use the actor."""
        self._retiring: dict[str, tuple[Any, asyncio.Event]] = {}
        """By name, actors that are taken out: the handle, and what is set once nobody uses it."""
        self._lives: dict[str, int] = {}
        """By name, how often the actor died."""
        self._none_left: OpdlmError | None = None

    @property
    def serving(self) -> int:
        """Number of actors that are ready."""
        return len(self.actors.keys() - self._starting.keys())

    @property
    def ready_names(self) -> list[str]:
        """Names of the actors that are ready, in the order in which they were added."""
        return [name for name in self.actors if name not in self._starting]

    def life(self, name: str) -> int:
        """How often the actor died."""
        return self._lives.get(name, 0)

    async def until_ready(self) -> None:
        """Waits until an actor is ready.

        Raises:
            OpdlmError: none is within `timeout_seconds`, or none is left.
        """
        while not self.serving:
            if self._none_left is not None:
                raise self._none_left
            try:
                async with asyncio.timeout(self.timeout_seconds):
                    await self._ready_again.wait()
            except TimeoutError:
                raise self._none_in_time() from None

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """While the block runs, `retire` does not end the actor."""
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if name in self._retiring and not self._users[name]:
                self._retiring[name][1].set()

    async def call_on(self, name: str, method: str, *args: Any, outputs: int = 0) -> tuple[list[Any], Any]:
        """Runs a method on one actor, beside other calls of it. Arguments and results as of `call`.

        Raises:
            ActorGone: the actor is dead.
            OpdlmError: no answer in time.
            RayError: whatever the method raised, unchanged.
        """
        actor = self.actors[name] if name in self.actors else self._retiring.get(name, [None])[0]
        if actor is None:
            raise ActorGone(name)
        life = self.life(name)
        with self.hold(name):
            try:
                refs = getattr(actor, method).options(num_returns=outputs + 1).remote(*args)
                *kept, small = refs if outputs else [refs]
                answer = await self._await_answer(small, f"{name}.{method}")
            except BaseException as error:
                if not is_death(error):
                    raise
                self.mark_dead(name, life, error)
                raise ActorGone(name) from error
        return kept, answer

    async def broadcast(self, method: str, *args: Any) -> None:
        """Runs a method on every ready actor, beside other calls of it; waits for all answers.

        An actor that dies meanwhile is left out.

        Raises:
            OpdlmError: no answer in time.
            RayError: whatever the method raised, unchanged.
        """

        async def on(name: str) -> None:
            with contextlib.suppress(ActorGone):
                await self.call_on(name, method, *args)

        await asyncio.gather(*(on(name) for name in self.ready_names))

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
            self._retiring[name] = actor, asyncio.Event()
            self.on_change()
            if self._users[name]:
                await self._retiring[name][1].wait()
            del self._retiring[name]
        stop_actors([actor])

    # --- states of an actor -------------------------------------------------------------------------------------

    def _none_in_time(self) -> OpdlmError:
        return OpdlmError(
            f"{', '.join(self.actors)}: none was ready within {self.timeout_seconds:g} s "
            "(resources.call_timeout_seconds); does the cluster still have room for an actor?"
        )

    def mark_dead(self, name: str, life: int, error: BaseException) -> None:
        """Notes that an actor died, and begins to wait for Ray's restart of it.

        A caller finds out by itself where an actor died between two calls and Ray has restarted it: nothing fails then.

        Args:
            life: how often the actor had died before the call. All calls that were open die with it, one after another,
                some perhaps when the actor is back already.
        """
        if life != self.life(name):
            return  # this death was told by another call
        if name not in self.actors or name in self._starting:
            return  # it is retired, or dies again before it was ready
        self._lives[name] = life + 1
        self.on_death(name, reason(error))
        self._starting[name] = asyncio.create_task(self._wait_until_ready(name))
        self.on_change()

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
                self._became_ready(name)
                self._tell_ready()
                return

    def _remove(self, name: str, error: Exception) -> None:
        """Takes out an actor that has no restart left; if it was the last, all calls fail until one is added."""
        del self.actors[name], self._starting[name]
        if could_not_begin(error):
            end = f"{name}: {last_line(error).partition('OpdlmError: ')[2] or last_line(error)}"
        else:
            end = (
                f"{name}: died more often than resources.actor_restarts {self.restarts} allows, and no other actor of "
                f"its kind is left: {first_line(error)}"
            )
        log.warning("%s has no restart left: %s; %d actors remain", name, reason(error), len(self.actors))
        if not self.actors:
            self._none_left = OpdlmError(end)
            self._nobody_left()
            self._tell_ready()

    def _became_ready(self, name: str) -> None:
        """Called when an actor has answered `ready`."""

    def _nobody_left(self) -> None:
        """Called when the last actor is gone."""

    def _tell_ready(self) -> None:
        self._ready_again.set()
        self._ready_again = asyncio.Event()
        self.on_change()

    async def _await_answer(self, ref: Any, what: str) -> Any:
        try:
            # Not `wait_for`: Python 3.11's loses a cancellation that comes together with the answer.
            async with asyncio.timeout(self.timeout_seconds):
                return await value_of(ref)
        except (TimeoutError, GetTimeoutError):
            raise OpdlmError(
                f"{what}: no answer in {self.timeout_seconds:g} s (resources.call_timeout_seconds); "
                "is the cluster alive, and is the limit long enough for one call?"
            ) from None
        except RaySystemError as error:
            raise OpdlmError(f"{what}: {first_line(error)}") from error


def is_death(error: BaseException) -> bool:
    """Whether the error of a call means that the called actor is dead.

    A `RayTaskError` comes from a living actor, even if it holds the error of another actor's death.
    """
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def could_not_begin(error: BaseException) -> bool:
    """Whether the actor's constructor raised. Ray does not restart such an actor; the error's last line says why."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def reason(error: BaseException) -> str:
    """The line of the error that says why the actor died."""
    return last_line(error) if could_not_begin(error) else first_line(error)


async def value_of(ref: Any) -> Any:
    """The value of an object reference, as a coroutine: `asyncio.wait_for` takes no reference."""
    return await ref


def stop_actors(actors: list[Any]) -> None:
    """Kills actors that this run started; Ray does not restart them."""
    for actor in actors:
        ray.kill(actor)
