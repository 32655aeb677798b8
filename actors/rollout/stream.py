"""The sequences that a rollout actor decodes continuously: requests come at any time, trajectories leave as they end.

add ──► inbox ──a slot is free──► decoder ──ended──► outbox ──harvest──► driver
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.sequences import as_sample, steps_by_tokens
from opdlm.common.types import DecodeStats, EndedSequence, RolloutRequest, ScoredTrajectory, StreamReport, Trajectory

_GROUP_SECONDS = 1.0
"""Trajectories that end within this time leave together, unless slots wait for more requests."""
_SIGN_SECONDS = 2.0
"""Longest time between two reports of an actor that makes steps."""


class SequenceStream:
    """One decoder's stream. The engine's thread calls `step` and `fail`; any thread calls `add` and `harvest`.

    Args:
        decoder: its slots and settings are those of the stream.
        ahead: requests that may wait for a slot; 0 slots must idle until a message comes.
        changed: held by whoever reads or changes the stream, and notified of each change.
    """

    def __init__(self, decoder: BlockDecoder, ahead: int, changed: threading.Condition) -> None:
        self.decoder, self._ahead, self._changed = decoder, ahead, changed
        self._inbox: deque[RolloutRequest] = deque()
        self._outbox: list[Trajectory] = []
        self._begun: dict[int, tuple[int, float]] = {}
        """By index of a sequence that is being decoded: its lane and when it began."""
        self._ended: list[tuple[int, float, float]] = []
        """Lane, begin and end of each sequence of the outbox."""
        self._failure: BaseException | None = None
        self._awaited = False
        """Whether somebody waits for a report."""
        self._may_begin = True
        """Whether sequences could begin in the last step."""
        self._steps = self._occupied_steps = self._tokens = self._live_positions = self._added = 0
        self._counts = decoder.forwards, decoder.forward_tokens, decoder.put_back
        self._seconds, self._reported = 0.0, time.monotonic()

    @property
    def live(self) -> bool:
        """Whether a sequence is being decoded."""
        return self.decoder.occupied > 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to decode."""
        return self.live or self.decoder.waiting > 0 or bool(self._inbox)

    @property
    def room(self) -> int:
        """See `StreamReport`. While sequences must end before others begin, another actor may be sooner."""
        if self.live and not self._may_begin:
            return 0
        return self.decoder.room + self._ahead - len(self._inbox)

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Takes requests.

        Raises:
            ValueError: one of them cannot be decoded; then none is taken.
        """
        self.decoder.check(requests)
        with self._changed:
            self._inbox.extend(requests)
            self._added += len(requests)
            self._changed.notify_all()

    def fail(self, error: BaseException, taken: bool = False) -> None:
        """Drops all sequences. If there are any, whoever waits for a report, or asks for one next, gets the error.

        Args:
            taken: requests that `take` has returned are dropped, too.
        """
        with self._changed:
            if taken or self.busy or self._outbox or self._awaited:
                self._failure = error
            self.decoder.clear()
            self._inbox.clear()
            self._outbox.clear()
            self._ended.clear()
            self._begun.clear()
            self._changed.notify_all()

    def take(self) -> list[RolloutRequest]:
        """Takes the requests out of the inbox that can begin now."""
        with self._changed:
            return [self._inbox.popleft() for _ in range(min(max(self.decoder.room, 0), len(self._inbox)))]

    def step(self, begin: Sequence[RolloutRequest] | None) -> None:
        """Runs one denoising step. `begin`: requests that begin as slots become free; None: no sequence may begin."""
        started = time.monotonic()
        if begin:
            self.decoder.add(begin)
            taken = {lane for lane, _ in self._begun.values()}
            free = (lane for lane in range(len(taken) + len(begin)) if lane not in taken)
            self._begun |= {request.index: (lane, started) for request, lane in zip(begin, free, strict=False)}
        ended = self.decoder.step(refill=begin is not None)
        tokens, live, now = self.decoder.tokens_so_far(), self.decoder.live_tokens, time.monotonic()
        with self._changed:
            self._steps += 1
            self._may_begin = begin is not None
            self._occupied_steps += self.decoder.occupied + len(ended)
            self._seconds += now - started
            self._tokens, self._live_positions = tokens, live
            self._outbox += ended
            self._ended += [(*self._begun.pop(trajectory.index), now) for trajectory in ended]
            self._changed.notify_all()

    def harvest(self, eager: bool) -> tuple[list[Trajectory | ScoredTrajectory], StreamReport]:
        """Waits until there is something to report; returns the trajectories that have ended, and the report.

        Trajectories that bring their own targets are samples already.

        Args:
            eager: more requests wait for this actor, so a report must not wait while slots are free.

        Raises:
            Exception: what ended the stream's sequences.
        """
        with self._changed:
            self._awaited = True
            # No step notifies while a job runs, such as an evaluation, but what has ended must not wait for that.
            while not self._changed.wait_for(
                lambda: self._failure is not None or self._report_is_due(eager), timeout=_GROUP_SECONDS
            ):
                pass
            self._awaited = False
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            return self._report()

    def _report_is_due(self, eager: bool) -> bool:
        waited = time.monotonic() - self._reported
        if not self._outbox:
            return waited >= _SIGN_SECONDS and self._steps > 0
        starving = not self._inbox and not self.decoder.waiting
        return not self.busy or waited >= _GROUP_SECONDS or (eager and starving)

    def _report(self) -> tuple[list[Trajectory | ScoredTrajectory], StreamReport]:
        now, decoder, trajectories = time.monotonic(), self.decoder, self._outbox
        settings = decoder.settings
        drafted = steps_by_tokens(trajectories, settings.block_size) if settings.strategy == "verified" else ()
        # Read once: the engine's thread may count on meanwhile.
        counts = decoder.forwards, decoder.forward_tokens, decoder.put_back
        new = [count - before for count, before in zip(counts, self._counts, strict=True)]
        stats = replace(
            DecodeStats.of(trajectories, decoder.version, new[0], new[1], self._seconds),
            slot_steps=self._steps * decoder.batch_size,
            occupied_slot_steps=self._occupied_steps,
            waiting_requests=len(self._inbox) + decoder.waiting,
            put_back=new[2],
            cache_positions=decoder.cache.positions,
            cache_live_positions=self._live_positions,
            steps_by_tokens=drafted,
        )
        ended = tuple(
            EndedSequence(t.index, t.lengths, t.weight_version, lane, now - began, now - end)
            for t, (lane, began, end) in zip(trajectories, self._ended, strict=True)
        )
        report = StreamReport(ended, self.room, self._added, self._tokens, stats)
        self._outbox, self._ended, self._steps, self._occupied_steps, self._seconds = [], [], 0, 0, 0.0
        self._counts, self._reported = counts, now
        return [as_sample(trajectory) for trajectory in trajectories], report
