"""Trajectories wait in one place, and a teacher that is free takes a batch of them, whoever decoded them.

score(trajectory) ──► waiting ──a teacher is free──► up to `teacher.batch_tokens` of like length ──► samples
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdlm.actors.pool import ActorPool
from opdlm.common.samples import SampleRef, sample_refs
from opdlm.deploy.observe.progress import SCORED, Call
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.dealing import Decoded


@dataclass(frozen=True, slots=True)
class _Item:
    """A trajectory whose sample somebody awaits."""

    trajectory: Decoded
    done: asyncio.Future[SampleRef]

    @property
    def tokens(self) -> int:
        """Of the teacher's forward."""
        return sum(self.trajectory.lengths) - 1


class Scoring:
    """Has the teacher pool score trajectories. Neither they nor the samples pass through this process.

    Args:
        per_reference: samples that share a reference (`common/samples.py`).
        batch_tokens: most tokens of a call, padding included; a longer trajectory gets a call of its own.
        round_size: samples of a round.
    """

    def __init__(
        self, teachers: ActorPool, records: RunRecords, per_reference: int, batch_tokens: int, round_size: int
    ) -> None:
        self.teachers, self.records = teachers, records
        self.per_reference, self.batch_tokens, self.round_size = per_reference, batch_tokens, round_size
        self._waiting: list[_Item] = []
        """Of the oldest round first; within a round as they came."""
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Number of trajectories that no teacher has taken yet."""
        return len(self._waiting)

    async def score(self, trajectory: Decoded) -> SampleRef:
        """Waits until a teacher has scored the trajectory.

        Raises:
            OpdlmError: no teacher is left, or one does not answer.
            RayError: what the scoring of its batch raised.
        """
        item = _Item(trajectory, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, item, key=self._round)
        if len(self._calls) < min(len(self._waiting), max(self.teachers.serving, 1)):
            call = asyncio.create_task(self._score_batches())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        return await item.done

    def _round(self, item: _Item) -> int:
        return item.trajectory.index // self.round_size

    async def _score_batches(self) -> None:
        """Has batches scored, one at a time, as long as trajectories wait."""
        while self._waiting:
            batch: list[_Item] = []
            try:
                await self._score_batch(batch)
            except Exception as error:
                for item in batch or self._waiting:  # without a batch, there is no teacher at all
                    if not item.done.done():
                        item.done.set_exception(error)
                if not batch:
                    self._waiting.clear()

    async def _score_batch(self, batch: list[_Item]) -> None:
        """Waits for a free teacher, fills `batch` and has the teacher score it."""
        progress = self.records.progress

        def arguments() -> tuple[tuple[Any, ...], int] | None:
            self._waiting = [item for item in self._waiting if not item.done.done()]  # callers may be cancelled
            if not self._waiting:
                return None
            # Of one round: the last samples of a round, which the learner waits for, do not wait for those of the next.
            tokens = [item.tokens for item in self._waiting if self._round(item) == self._round(self._waiting[0])]
            share = -(-sum(tokens) // max(self.teachers.serving, 1))  # the others are free soon
            chosen = like_lengths(tokens, min(share, self.batch_tokens))
            batch.extend(self._waiting[place] for place in chosen)
            self._waiting = [item for place, item in enumerate(self._waiting) if place not in chosen]
            groups = list(dict.fromkeys(item.trajectory.group for item in batch))
            number = {group: i for i, group in enumerate(groups)}
            places = [(number[item.trajectory.group], item.trajectory.place) for item in batch]
            call = opened.enter_context(progress.call(SCORED, [item.trajectory.index for item in batch]))
            calls.append(call)
            return (places, self.per_reference, *(call.watch or (None,)), *groups), -(-len(batch) // self.per_reference)

        calls: list[Call] = []
        with contextlib.ExitStack() as opened:
            answer = await self.teachers.call_late("score", arguments)
            if answer is None:
                return
            groups, stats = answer
            calls[0].tokens = stats.tokens
        self.records.scored(stats)
        for item, sample in zip(batch, sample_refs(groups, self.per_reference, stats.lengths), strict=True):
            if not item.done.done():
                item.done.set_result(sample)


def like_lengths(lengths: Sequence[int], most: int) -> set[int]:
    """Chooses the first item and those nearest to it in length, as many as fit.

    Args:
        lengths: tokens of each item; not empty.
        most: tokens of the choice, each item padded to the longest.

    Returns: places of the chosen items; the first one is always among them.
    """
    chosen, longest = {0}, lengths[0]
    for place in sorted(range(1, len(lengths)), key=lambda place: abs(lengths[place] - lengths[0])):
        if max(longest, lengths[place]) * (len(chosen) + 1) > most:
            break
        chosen.add(place)
        longest = max(longest, lengths[place])
    return chosen
