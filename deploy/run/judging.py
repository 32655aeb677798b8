"""Has the reward pool judge groups of responses, each as soon as all responses to its prompt are there.

    judge(response) ──► its group waits ──the last one is there──► rewards, advantages ──► samples

The rewards of a group are kept as long as its samples can be lost. A response that is asked for again takes no part in
its group until it is there again; then it gets its advantage among the rewards of the others. The queue leases a lost
group whole, so the others' rewards are those of samples that are still held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from opdlm.actors.pool import ActorPool
from opdlm.common.data.prompts import PromptOrder
from opdlm.common.samples import SampleRef
from opdlm.deploy.observe.progress import SCORED
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.dealing import Decoded


@dataclass(slots=True)
class _Group:
    """The responses to one prompt."""

    rewards: dict[int, float] = field(default_factory=dict)
    """By index of the sample, what was judged before."""
    waiting: dict[int, tuple[Decoded, asyncio.Future[SampleRef]]] = field(default_factory=dict)
    """By index, decoded and not judged yet."""


class Judging:
    """Collects groups and has them judged. Responses and samples do not pass through this process.

    Args:
        order: which prompt each sample has.
        kept: most prompts from the oldest whose samples no checkpoint covers to the newest.
        complete: adds to a list of samples, behind a reference, what else they need; None: nothing.
    """

    def __init__(
        self,
        rewards: ActorPool,
        records: RunRecords,
        order: PromptOrder,
        kept: int,
        complete: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        self._rewards, self._records, self._order, self._complete = rewards, records, order, complete
        self._groups: dict[int, _Group] = {}
        """By number of the prompt in the order."""
        self._kept = kept

    def expect(self, index: int) -> None:
        """Says that a response is about to be made: for the first time, or again, because its sample is gone."""
        number = index // self._order.responses_per_prompt
        group = self._groups.setdefault(number, _Group())
        group.rewards.pop(index, None)
        group.waiting.pop(index, None)
        for old in [one for one in self._groups if one < number - self._kept]:
            del self._groups[old]

    async def judge(self, response: Decoded) -> SampleRef:
        """Waits until the response's group is judged; returns its sample.

        Raises:
            OpdlmError: the reward failed, or no reward actor is left.
        """
        size = self._order.responses_per_prompt
        group = self._groups[response.index // size]
        done: asyncio.Future[SampleRef] = asyncio.get_running_loop().create_future()
        group.waiting[response.index] = response, done
        # While some of the group are judged, another one may be asked for again and come back: then it is its turn.
        while group.waiting and len(group.rewards) + len(group.waiting) == size:
            await self._judge(group)
        return await done

    async def _judge(self, group: _Group) -> None:
        """Judges what waits of a group, beside what was judged before."""
        waiting, group.waiting = dict(sorted(group.waiting.items())), {}
        indices, lists = list(waiting), list(dict.fromkeys(response.group for response, _ in waiting.values()))
        places = [(lists.index(response.group), response.place) for response, _ in waiting.values()]
        others = [group.rewards[index] for index in sorted(group.rewards)]
        prompt = self._order[indices[0]]
        try:
            with self._records.progress.call(SCORED, indices) as call:
                (samples,), stats = await self._rewards.call(
                    "judge", places, prompt.reference, others, *lists, outputs=1
                )
                if self._complete is not None:
                    samples = await self._complete(samples)
                call.tokens = sum(response.lengths[1] for response, _ in waiting.values())
        except Exception as error:
            for _, done in waiting.values():
                if not done.done():
                    done.set_exception(error)
            return
        group.rewards |= dict(zip(indices, stats.rewards, strict=True))
        self._records.judged(stats)
        for place, (response, done) in enumerate(waiting.values()):
            if not done.done():
                done.set_result(SampleRef(samples, place, *response.lengths))
