"""A rollout actor with slots in virtual time: its messages are those of `RolloutActor`, its steps only take time."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayError

from opdlm.common.errors import StreamLost
from opdlm.common.types import DecodeStats, EndedSequence, RolloutRequest, StreamReport, WeightHandle


class SlotRollout:
    """Decodes what it is sent, one step of all slots at a time.

    Args:
        slots: number of slots.
        length: denoising steps of the sequence with an index; nobody else knows them.
        step_seconds: of virtual time.
        push_seconds: to load weights.
        continues: `rollout.on_new_weights: continue`.
        restarts: how often it may die and come back.
    """

    def __init__(
        self,
        slots: int,
        length: Callable[[int], int],
        step_seconds: float = 1.0,
        push_seconds: float = 0.0,
        continues: bool = False,
        restarts: int = 0,
    ) -> None:
        self.slots, self.length, self.step_seconds = slots, length, step_seconds
        self.push_seconds, self.continues, self.restarts = push_seconds, continues, restarts
        self.ended: list[tuple[int, int]] = []
        """(index, oldest weight version) of what it has decoded."""
        self.steps: list[tuple[float, int]] = []
        """(virtual seconds at its end, occupied slots) of each step."""
        self.alive = True
        self.began: dict[int, float] = {}
        self.changed = asyncio.Event()
        self.streams = self.lives = 0
        self._begin_life()
        self._engine = asyncio.ensure_future(self._run())

    def _begin_life(self) -> None:
        self.lives += 1
        self.opened = False
        self.version = self.arrived = -1
        self.ahead = self.added = 0
        self.inbox: deque[RolloutRequest] = deque()
        self.live: dict[int, tuple[int, int]] = {}
        """By index: steps left, oldest weight version."""
        self.outbox: list[tuple[int, int]] = []

    def die(self) -> None:
        """Drops everything; every open call fails."""
        self.alive = False
        self._tell()

    def die_and_come_back(self) -> None:
        """Drops everything; Ray has restarted it before anybody calls it, so that only open calls fail."""
        self._begin_life()
        self._tell()

    async def ready(self) -> None:
        if not self.alive:
            if not self.restarts:
                raise RayActorError
            self.restarts -= 1
            await asyncio.sleep(3)
            self._begin_life()
            self.alive = True
            self._tell()

    async def forget_weights(self) -> None:
        self.version = self.arrived = -1

    async def load_weights(self, handle: WeightHandle) -> float:
        self._check()
        self.arrived = max(self.arrived, handle.version)
        self._tell()
        if not (self.continues and self.live):
            await self._until(lambda: self.version >= handle.version)
        return 0.0

    async def open_stream(self, settings: Any, slots: int, ahead: int) -> int:
        self._check()
        self.inbox.clear()
        self.live, self.outbox, self.ahead, self.added = {}, [], ahead, 0
        self.streams += 1
        self.opened = True
        self._tell()
        return self.slots + ahead

    async def add(self, requests: list[RolloutRequest], handle: WeightHandle) -> None:
        self._check_opened()
        self.arrived = max(self.arrived, handle.version)
        self.inbox.extend(requests)
        self.added += len(requests)
        self._tell()

    async def harvest(self, eager: bool) -> tuple[list[int], StreamReport]:
        self._check_opened()
        stream = self.streams
        await self._until(lambda: bool(self.outbox) or self.streams != stream)
        if self.streams != stream:
            raise RayError("a new stream has begun")
        ended, self.outbox = self.outbox, []
        sequences = tuple(EndedSequence(i, (8, self.length(i)), version, 0, 1.0, 0.0) for i, version in ended)
        versions = tuple(version for _, version in ended)
        stats = DecodeStats(min(versions), len(ended), len(ended), 1, 1, 1, 0.1, weight_versions=versions)
        finishes = self.live and self.arrived > self.version and not self.continues
        room = 0 if finishes else self.slots + self.ahead - len(self.live) - len(self.inbox)
        return [i for i, _ in ended], StreamReport(sequences, room, self.added, 0, stats)

    async def _run(self) -> None:
        while True:
            if not self.alive:
                await self.changed.wait()
                continue
            if self.arrived > self.version and (self.continues or not self.live):
                await asyncio.sleep(self.push_seconds)
                self.version = self.arrived
                self._tell()
            if self.arrived == self.version:
                while self.inbox and len(self.live) < self.slots:
                    request = self.inbox.popleft()
                    self.live[request.index] = self.length(request.index), self.version
                    self.began[request.index] = self._now()
            if not self.live:
                await self.changed.wait()
                continue
            # Nothing changes before the next sequence ends or a message comes: so many steps are made at once.
            most = min(left for left, _ in self.live.values())
            began, changed = self._now(), self.changed
            try:
                await asyncio.wait_for(changed.wait(), most * self.step_seconds)
                steps = min(max(math.ceil((self._now() - began) / self.step_seconds), 1), most)
                await asyncio.sleep(max(began + steps * self.step_seconds - self._now(), 0))
            except TimeoutError:
                steps = most
            if not self.alive:
                continue
            self.steps.append((self._now(), len(self.live) * steps))
            for index, (left, version) in list(self.live.items()):
                self.live[index] = left - steps, version
                if left == steps:
                    del self.live[index]
                    self.outbox.append((index, version))
                    self.ended.append((index, version))
            self._tell()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def _check(self) -> None:
        if not self.alive:
            raise RayActorError

    async def _until(self, condition: Callable[[], bool]) -> None:
        self._check()
        life = self.lives
        while not condition():
            await self.changed.wait()
            if self.lives != life:
                raise RayActorError
            self._check()

    def _check_opened(self) -> None:
        self._check()
        if not self.opened:
            raise StreamLost("the actor was restarted")
