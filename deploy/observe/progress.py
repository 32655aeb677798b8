"""How far a run is between two records: samples decoded and scored of the round, steps trained, answers given.

Rollout actors report what they decode as they go (`actors/rollout/stream.py`). The driver notes each other call of an
actor when it begins and ends (`RunProgress.call`); how far a long call has come tells the actor itself
(`actors/progress.py`). Only the view is told; no record is written.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from opdlm.actors.progress import CallProgress, Watch
from opdlm.learner.schedule import TrainingSchedule

if TYPE_CHECKING:
    from opdlm.deploy.cluster.roles import Roles
    from opdlm.deploy.observe.records import RunRecords

DECODED, SCORED = "decoded", "scored"
"""What is done with the samples of a round. Any other name is a task's: an evaluation, the teacher's responses."""
_STEPS = "optimizer steps"
_POLL_SECONDS = 2.0
_WINDOW_SECONDS = 10.0
"""Rates are means over about this time."""


@dataclass(slots=True)
class Call:
    """A call of an actor, from its begin to its end."""

    watch: tuple[Watch, ...]
    """A further argument of the call, with which the actor tells how far it has come; none where nobody listens."""
    tokens: int = 0
    """Response tokens, once the call has ended."""


@dataclass(slots=True)
class _Counts:
    """What the calls of one name have done."""

    open: dict[str, Sequence[int]] = field(default_factory=dict)
    """By name of the call, the samples that it works on."""
    done: set[int] = field(default_factory=set)
    """Samples of ended calls, of rounds that are not trained yet. Tasks leave it empty."""
    ended: int = 0
    tokens: int = 0
    """Sequences and tokens of all ended calls."""


class RunProgress:
    """Counts what the actors of a run have done."""

    def __init__(self) -> None:
        self.board: Any = None
        """Handle of the actor that calls tell how far they have come; None: they tell nobody."""
        self.schedule: TrainingSchedule | None = None
        """The run's; without it there are figures of tasks only."""
        self.learner_began = True
        """Whether the learner has told anything; before that the run only starts."""
        self.unfinished: dict[str, int] = {}
        """By rollout actor, response tokens of the sequences that it is decoding."""
        self._counts: dict[str, _Counts] = {}
        self._tasks: dict[str, int] = {}
        """By name of a task that goes on, how many sequences it has."""
        self._numbers = itertools.count()
        self._round = self._step = self._trained = 0
        """The round that is being made, optimizer steps so far, and the first sample that no trained round has."""
        self._history: deque[tuple[float, dict[str, tuple[int, int]]]] = deque()
        """(seconds, by name: sequences and tokens so far), oldest first."""

    @contextmanager
    def call(self, name: str, samples: Sequence[int]) -> Iterator[Call]:
        """A call that works on these samples, or on these sequences of a task. An error means that nothing was done."""
        counts, key = self._counts.setdefault(name, _Counts()), f"{name} {next(self._numbers)}"
        counts.open[key] = samples
        call = Call((Watch(self.board, key),) if self.board is not None else ())
        try:
            yield call
            counts.ended += len(samples)
            counts.tokens += call.tokens
            if name in (DECODED, SCORED):
                counts.done.update(samples)
        finally:
            del counts.open[key]

    def decoded(self, samples: Sequence[int], tokens: int) -> None:
        """These samples were decoded, outside of any call."""
        counts = self._counts.setdefault(DECODED, _Counts())
        counts.ended += len(samples)
        counts.tokens += tokens
        counts.done.update(samples)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[None]:
        """A task of `total` sequences, which calls of its name work on."""
        self._tasks[name], self._counts[name] = total, _Counts()
        try:
            yield
        finally:
            del self._tasks[name], self._counts[name]

    def at(self, round_: int, step: int) -> None:
        """The learner works on this round, or waits for it, after `step` optimizer steps."""
        self._round, self._step = round_, step
        if self.schedule is not None:
            self._trained = max(self._trained, round_ * self.schedule.prompts_per_round)
            for counts in self._counts.values():
                counts.done = {sample for sample in counts.done if sample >= self._trained}

    def forget_samples(self) -> None:
        """The queue died, and with it all samples that no checkpoint covers."""
        self._trained = 0
        for name in (DECODED, SCORED):
            self._counts.pop(name, None)
        self._history.clear()

    def figures(self, board: Mapping[str, CallProgress], seconds: float) -> dict[str, Any]:
        """What the view shows.

        Args:
            board: how far watched calls have come, by name; those of ended calls are passed over.
            seconds: a clock's.

        Returns: `tasks`, and where a round is being made its number `round` (from 1), `rounds` and `stages`, which are
        empty while the learner starts. A task or
        stage has `name`, `done`, `total`, `per_second` and perhaps `tokens_per_second`; stages also `ahead`, the number
        of samples of later rounds.
        """
        so_far = {name: _so_far(counts, board) for name, counts in self._counts.items()} | {_STEPS: (self._step, 0)}
        if DECODED in so_far:
            sequences, tokens = so_far[DECODED]
            so_far[DECODED] = sequences, tokens + sum(self.unfinished.values())
        self._history.append((seconds, so_far))
        while len(self._history) > 2 and self._history[1][0] <= seconds - _WINDOW_SECONDS:
            self._history.popleft()
        before, then = self._history[0]

        def rates(name: str) -> dict[str, float]:
            elapsed = max(seconds - before, 1e-9)
            grown = [max(now - was, 0) / elapsed for now, was in zip(so_far[name], then.get(name, (0, 0)), strict=True)]
            return {"per_second": grown[0]} | ({"tokens_per_second": grown[1]} if so_far[name][1] else {})

        tasks = [
            {"name": name, "done": min(so_far[name][0], total), "total": total} | rates(name)
            for name, total in self._tasks.items()
        ]
        made: dict[str, Any] = {"kind": "progress", "tasks": tasks}
        schedule = self.schedule
        if schedule is None or self._round >= schedule.rounds:
            return made
        made |= {"round": self._round + 1, "rounds": schedule.rounds, "stages": []}
        if not self.learner_began:
            return made
        first = self._round * schedule.prompts_per_round
        end = min(first + schedule.prompts_per_round, schedule.total)
        stages = []
        for name in (DECODED, SCORED):
            if name in self._counts:
                finished = self._counts[name].done | _finished(self._counts[name], board)
                done = sum(sample in finished or sample < self._trained for sample in range(first, end))
                ahead = sum(sample >= end for sample in finished)
                stages.append({"name": name, "done": done, "total": end - first, "ahead": ahead} | rates(name))
        steps = [schedule.steps_before(self._round + i) for i in (0, 1)]
        done = min(max(self._step - steps[0], 0), steps[1] - steps[0])
        stages.append({"name": _STEPS, "done": done, "total": steps[1] - steps[0], "ahead": 0} | rates(_STEPS))
        return made | {"stages": stages}


def _finished(counts: _Counts, board: Mapping[str, CallProgress]) -> set[int]:
    """Samples that calls which still go on have finished."""
    return {sample for call in counts.open if call in board for sample in board[call].finished}


def _so_far(counts: _Counts, board: Mapping[str, CallProgress]) -> tuple[int, int]:
    """Sequences and tokens of ended calls and of those that go on."""
    running = [board[call] for call in counts.open if call in board]
    return counts.ended + sum(len(c.finished) for c in running), counts.tokens + sum(c.tokens for c in running)


class ProgressWatch:
    """Shows the view how far the run is, every two seconds."""

    def __init__(self, roles: Roles, schedule: TrainingSchedule, records: RunRecords) -> None:
        self._roles, self._records = roles, records
        records.progress.schedule, records.progress.board = schedule, roles.queue
        records.progress.learner_began = False

    async def watch(self) -> None:
        """Goes on until it is cancelled."""
        progress = self._records.progress
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            progress.board = self._roles.queue  # another one after the queue died
            try:
                board = await self._roles.queue.progress.remote()
            except RayError:
                continue  # the queue is dead: `recovery.py` starts another
            self._records.progressed(board, asyncio.get_running_loop().time())
