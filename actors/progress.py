"""How far a call of an actor has come, told while the call runs: its caller learns of the call only when it ends.

    actor, in its call ──note_progress, every 2 s──► board (the replay queue) ◄──progress── the driver's view

A call that is watched gets a `Watch`; the actor pushes small counts, and nobody waits for them. So no actor needs a
second thread, and the results are those of a call that nobody watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_EVERY_SECONDS = 2.0
"""Shortest time between two messages of a call."""
_MOST_CALLS = 1000

OnBatch = Callable[[Sequence[int]], None]
"""Called with the places of the sequences that have just been finished."""


@dataclass(frozen=True, slots=True)
class CallProgress:
    """How far one call has come."""

    finished: tuple[int, ...]
    """Indices of the sequences that are finished."""
    tokens: int
    """Response tokens so far, those of unfinished sequences too."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Where a call tells how far it has come."""

    board: Any
    """Handle of an actor with a method `note_progress(call, progress)`."""
    call: str
    """Name of the call; its caller chooses it."""


class ProgressBoard:
    """The methods of an actor that calls tell how far they have come. They are coroutines of its event loop."""

    def __init__(self) -> None:
        self._calls: dict[str, CallProgress] = {}
        """By name, the newest calls; at most `_MOST_CALLS`."""

    async def note_progress(self, call: str, progress: CallProgress) -> None:
        """An actor tells how far its call has come."""
        self._calls.pop(call, None)
        self._calls[call] = progress
        if len(self._calls) > _MOST_CALLS:
            del self._calls[next(iter(self._calls))]  # the one that told nothing for the longest time

    async def progress(self) -> dict[str, CallProgress]:
        """How far the newest calls have come, ended ones among them."""
        return self._calls


class Teller:
    """Tells the board of a watch, at most every two seconds; without a watch it does nothing.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, watch: Watch | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._clock, self._last = watch, clock, clock()

    def __call__(self, progress: Callable[[], CallProgress]) -> None:
        """Sends what `progress()` returns, if a message is due."""
        if self._watch is None or self._clock() - self._last < _EVERY_SECONDS:
            return
        self._last = self._clock()
        self._watch.board.note_progress.remote(self._watch.call, progress())


class BatchCount:
    """Counts the batches of a call and tells of them.

    Args:
        indices: index of each sequence of the call, by place.
        tokens: response tokens of each, where they are known before the call.
    """

    def __init__(self, watch: Watch | None, indices: Sequence[int], tokens: Sequence[int]) -> None:
        self._tell, self._indices, self._tokens = Teller(watch), indices, tokens
        self._finished: list[int] = []

    def __call__(self, places: Sequence[int]) -> None:
        """The sequences at these places are finished."""
        self._finished += places
        self._tell(self._progress)

    def _progress(self) -> CallProgress:
        finished = self._finished
        tokens = sum(self._tokens[place] for place in finished) if self._tokens else 0
        return CallProgress(tuple(self._indices[place] for place in finished), tokens)


def unheard(places: Sequence[int]) -> None:
    """The `OnBatch` of a call that nobody watches."""
