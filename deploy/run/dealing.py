"""Deals requests to the rollout actors, late: each goes to an actor only when that actor has room for it.

    decode(request) ──► waiting ──an actor has room──► its slots ──its report──► the caller has its trajectory
                           ▲                             │
                           └───────the actor died────────┘

So a fast actor decodes more, and no actor waits while another has a backlog. Each actor is served by a coroutine of its
own, with one `harvest` at a time, which waits in the actor until there is something to report.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from opdlm.actors.members import ActorGone
from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.errors import OpdlmError, StreamLost
from opdlm.common.types import RolloutRequest, StreamReport, WeightHandle
from opdlm.deploy.observe.records import RunRecords


@dataclass(frozen=True, slots=True)
class Decoded:
    """Where a trajectory is: at index `place` of the list of trajectories that `group` refers to."""

    group: Any
    place: int
    index: int
    lengths: tuple[int, int]
    """Prompt tokens, response tokens."""
    weight_version: int
    """The oldest weights that decoded it."""


@dataclass(slots=True)
class _Item:
    """A request whose trajectory somebody awaits."""

    request: RolloutRequest
    weights: WeightHandle
    done: asyncio.Future[Decoded]


@dataclass(slots=True)
class _Session:
    """What the dealer knows of one ready actor."""

    name: str
    room: int = 0
    """Requests that the actor would take, less those that were chosen for it since it said so."""
    added: int = 0
    """Requests that were sent to it in this stream."""
    chosen: list[_Item] = field(default_factory=list)
    """Chosen for it, and not sent yet."""
    sent: dict[int, _Item] = field(default_factory=dict)
    """By index, what it decodes."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def wake_if_cancelled(self, done: asyncio.Future[Decoded]) -> None:
        if done.cancelled():
            self.wake.set()

    @property
    def items(self) -> list[_Item]:
        return [*self.sent.values(), *self.chosen]

    @property
    def load(self) -> int:
        return len(self.chosen) + len(self.sent)


class Dealer:
    """Has the actors of a pool decode requests.

    Args:
        slots: of each actor.
        ahead: requests that may wait in an actor for a slot.
    """

    def __init__(
        self, actors: ActorPool, records: RunRecords, settings: DecodeSettings, slots: int, ahead: int
    ) -> None:
        self._actors, self._records = actors, records
        self._stream = settings, slots, ahead
        self._waiting: deque[_Item] = deque()
        self._sessions: dict[str, _Session] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By name of the actor, the coroutine that serves it."""
        self._failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failing.set_result(None)
        """Fails what waits, unless an actor becomes ready."""
        self._room_changed = asyncio.Event()
        self._failure: Exception | None = None
        """Why nothing can be decoded any more."""
        self._asked_for_more = False
        """Whether somebody waits for room, so that there may be more to deal as soon as there is room."""
        actors.on_change = self._actors_changed
        self._actors_changed()

    async def decode(self, request: RolloutRequest, weights: WeightHandle) -> Decoded:
        """Waits until an actor has decoded the request, with these weights or with newer ones.

        Raises:
            OpdlmError: no actor is left, or one does not answer.
            RayError: what ended the decoding in the actor.
        """
        if self._failure is not None:
            raise self._failure
        item = _Item(request, weights, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._deal()
        return await item.done

    async def room(self) -> int:
        """Waits until the actors have room for further requests; returns for how many.

        Raises:
            OpdlmError: no actor is left, or none is ready in time.
        """
        self._asked_for_more = True
        while True:
            changed = self._room_changed
            if self._failure is not None:
                raise self._failure
            room = sum(max(session.room, 0) for session in self._serving()) - len(self._waiting)
            if room > 0:
                self._asked_for_more = False
                return room
            await (changed.wait() if self._sessions else self._actors.until_ready())

    def _serving(self) -> list[_Session]:
        """The sessions of actors that are ready."""
        return [self._sessions[name] for name in self._actors.ready_names if name in self._sessions]

    def _actors_changed(self) -> None:
        """Begins to serve actors that have become ready; those that are being retired get nothing more."""
        for name in self._actors.ready_names:
            if name not in self._sessions:
                self._sessions[name] = _Session(name)
                self._tasks[name] = asyncio.create_task(self._serve(self._sessions[name]))
        for session in self._sessions.values():
            session.wake.set()
        self._deal()

    def _deal(self) -> None:
        """Chooses an actor for each waiting request while any has room: the one with the least to do."""
        serving = self._serving()
        while self._waiting:
            able = [session for session in serving if session.room > 0]
            if not able:
                break
            item = self._waiting.popleft()
            if item.done.done():
                continue  # its caller was cancelled
            session = min(able, key=lambda session: session.load)
            session.chosen.append(item)
            item.done.add_done_callback(session.wake_if_cancelled)
            session.room -= 1
            session.wake.set()
        if self._waiting and not self._sessions and self._failing.done():
            self._failing = asyncio.create_task(self._fail_without_actors())

    async def _fail_without_actors(self) -> None:
        try:
            await self._actors.until_ready()
        except OpdlmError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Everything that waits fails, and whatever is asked for later."""
        self._failure = error
        _fail(self._waiting, error)
        self._waiting.clear()
        self._room_changes()

    async def _serve(self, session: _Session) -> None:
        """Deals to one actor until it dies or is retired."""
        try:
            with self._actors.hold(session.name):
                while await self._stream_with(session):
                    pass
        except ActorGone:
            self._waiting.extendleft(sorted(session.items, key=lambda item: -item.request.index))
        except Exception as error:  # it does not answer, or whatever it is: nobody may wait for ever
            _fail(session.items, error)
            self._give_up(error)
        del self._sessions[session.name]
        if self._failure is None:
            self._actors_changed()
        self._room_changes()

    async def _stream_with(self, session: _Session) -> bool:
        """Serves one stream of an actor.

        Returns: False once the actor is being retired and has ended its sequences; True if a new stream must begin,
        because this one has failed or all who awaited its sequences were cancelled.
        """
        name, life = session.name, self._actors.life(session.name)
        harvest: asyncio.Task[tuple[list[Any], StreamReport]] | None = None
        # An error of this call ends the run: there is nothing that another try would change.
        _, session.room = await self._actors.call_on(name, "open_stream", *self._stream)
        session.added = 0
        try:
            self._deal()
            self._room_changes()
            while session.chosen or session.sent or name in self._actors.actors:
                if self._actors.life(name) != life:
                    raise ActorGone(name)  # while it had nothing to do; it has no stream any more
                session.wake.clear()
                if session.sent and all(item.done.cancelled() for item in session.sent.values()):
                    session.sent.clear()
                    return True  # nobody awaits it any more, so the actor need not end it
                if session.chosen:
                    await self._send(session)
                if session.sent and harvest is None:
                    eager = self._asked_for_more or bool(self._waiting)
                    harvest = asyncio.create_task(self._actors.call_on(name, "harvest", eager, outputs=1))
                waking = asyncio.create_task(session.wake.wait())
                await asyncio.wait([waking, harvest] if harvest else [waking], return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                if harvest is not None and harvest.done():
                    (group,), report = harvest.result()
                    harvest = None
                    self._reported(session, group, report)
            return False
        except StreamLost as error:  # it died while nobody called it, and is back
            self._actors.mark_dead(name, life, error)
            raise ActorGone(name) from error
        except RayError as error:
            _fail(session.items, error)
            session.sent.clear()
            session.chosen.clear()
            return True
        finally:
            self._records.progress.unfinished.pop(name, None)
            if harvest is not None:
                harvest.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody awaits it

    async def _send(self, session: _Session) -> None:
        items, session.chosen = [item for item in session.chosen if not item.done.done()], []
        if not items:
            return
        session.sent |= {item.request.index: item for item in items}
        newest = max((item.weights for item in items), key=lambda weights: weights.version)
        try:
            await self._actors.call_on(session.name, "add", [item.request for item in items], newest)
        except StreamLost:
            raise
        except RayError as error:
            for item in items:
                del session.sent[item.request.index]
            session.room += len(items)
            _fail(items, error)
        else:
            session.added += len(items)
            self._records.progress.decoded([], 0)  # from now on decoding is shown

    def _reported(self, session: _Session, group: Any, report: StreamReport) -> None:
        for place, one in enumerate(report.ended):
            item = session.sent.pop(one.index)
            if not item.done.done():
                item.done.set_result(Decoded(group, place, one.index, one.lengths, one.weight_version))
        session.room = report.room - (session.added - report.added) - len(session.chosen)
        self._records.streamed(session.name, report)
        self._deal()
        self._room_changes()

    def _room_changes(self) -> None:
        self._room_changed.set()
        self._room_changed = asyncio.Event()


def _fail(items: Any, error: Exception) -> None:
    for item in items:
        if not item.done.done():
            item.done.set_exception(error)
