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

from ray.exceptions import RayError

from opdlm.actors.pool import ActorPool
from opdlm.common.samples import SampleRef, sample_refs
from opdlm.deploy.observe.progress import SCORED, Call
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.dealing import Decoded


@dataclass(slots=True)
class _Item:
    """A trajectory whose sample somebody awaits."""

    trajectory: Decoded
    done: asyncio.Future[SampleRef]
    apart: bool = False
    """Whether it is scored without those of other groups: one of several groups, perhaps its own, cannot be had."""

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
            RayError: what the scoring of its batch raised; of a batch without trajectories of other groups.
        """
        item = _Item(trajectory, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, item, key=self._round)
        if len(self._calls) < min(len(self._waiting), max(self.teachers.serving, 1)):
            self._calls.add(asyncio.create_task(self._score_batches()))
        return await item.done

    def _round(self, item: _Item) -> int:
        return item.trajectory.index // self.round_size

    def _go_together(self, first: _Item, other: _Item) -> bool:
        """Whether they may be in one batch: the last samples of a round, which the learner waits for, do not wait for
        those of the next.
        """
        if first.apart or other.apart:
            return bool(first.trajectory.group == other.trajectory.group)
        return self._round(first) == self._round(other)

    async def _score_batches(self) -> None:
        """Has batches scored, one at a time, as long as trajectories wait."""
        try:
            while self._waiting:
                batch: list[_Item] = []
                try:
                    await self._score_batch(batch)
                except Exception as error:
                    if isinstance(error, RayError) and len({item.trajectory.group for item in batch}) > 1:
                        for item in batch:  # the node of one group may have died; the others must not fail with it
                            item.apart = True
                            bisect.insort(self._waiting, item, key=self._round)
                        continue
                    for item in batch or self._waiting:  # without a batch, there is no teacher at all
                        if not item.done.done():
                            item.done.set_exception(error)
                    if not batch:
                        self._waiting.clear()
        finally:  # at once, so that whatever comes in this turn of the event loop starts another
            self._calls.discard(asyncio.current_task())

    async def _score_batch(self, batch: list[_Item]) -> None:
        """Waits for a free teacher, fills `batch` and has the teacher score it."""
        progress = self.records.progress

        def arguments() -> tuple[tuple[Any, ...], int] | None:
            self._waiting = [item for item in self._waiting if not item.done.done()]  # callers may be cancelled
            if not self._waiting:
                return None
            able = [item for item in self._waiting if self._go_together(self._waiting[0], item)]
            tokens = [item.tokens for item in able]
            share = -(-sum(tokens) // max(self.teachers.serving, 1))  # the others are free soon
            batch.extend(able[place] for place in sorted(like_lengths(tokens, min(share, self.batch_tokens))))
            taken = set(map(id, batch))
            self._waiting = [item for item in self._waiting if id(item) not in taken]
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
