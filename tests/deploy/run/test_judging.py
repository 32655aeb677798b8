"""Groups of responses are judged whole, whatever is lost and made again. `pytest tests/deploy/run/test_judging.py`"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlm.actors.reward.actor import RewardStats
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.errors import OpdlmError
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.run.dealing import Decoded
from opdlm.deploy.run.judging import Judging
from tests.patience import PATIENCE

GROUP = 3


class Records:
    def __init__(self) -> None:
        self.progress, self.stats = RunProgress(), []

    def judged(self, stats: RewardStats) -> None:
        self.stats.append(stats)


class Rewards:
    """A reward pool. A response is a number, which is its reward, and its sample is all rewards it was judged among."""

    def __init__(self) -> None:
        self.calls, self.failures = 0, 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def call(self, method: str, places: Any, reference: Any, others: Sequence[float], *lists: Any, outputs: int):
        assert (method, outputs) == ("judge", 1)
        self.calls += 1
        await self.may_answer.wait()
        if self.failures:
            self.failures -= 1
            raise OpdlmError("the reward failed")
        rewards = [float(lists[number][place]) for number, place in places]
        among = sorted([*rewards, *others])
        return ([(reward, among) for reward in rewards],), RewardStats(tuple(rewards), False, (), 0.0)


def judging(kept: int = 100) -> tuple[Judging, Rewards, Records]:
    prompts = [Prompt(f"p/{i}", np.array([1], np.int32)) for i in range(50)]
    rewards, records = Rewards(), Records()
    return Judging(rewards, records, PromptOrder(prompts, 0, 1, (), GROUP), kept), rewards, records


def ask(judge: Judging, index: int, reward: float) -> asyncio.Task:
    """A response of this index and reward is made and handed in."""
    judge.expect(index)
    return asyncio.ensure_future(judge.judge(Decoded((reward,), 0, index, (1, 1), 0)))


async def sample_of(task: asyncio.Task) -> tuple[float, list[float]]:
    """(own reward, the rewards that it was judged among)."""
    reference = await asyncio.wait_for(task, PATIENCE)
    return reference.group[reference.place]


def test_a_group_waits_for_its_last_response() -> None:
    async def run() -> None:
        judge, rewards, records = judging()
        tasks = [ask(judge, index, float(index)) for index in (4, 3, 0)]
        await asyncio.sleep(0.01)
        assert rewards.calls == 0
        assert not any(task.done() for task in tasks)
        last = ask(judge, 5, 5.0)
        assert [await sample_of(t) for t in (*tasks[:2], last)] == [(i, [3, 4, 5]) for i in (4.0, 3.0, 5.0)]
        assert not tasks[2].done()
        assert len(records.stats) == 1

    asyncio.run(run())


def test_a_lost_response_is_judged_among_the_others_and_a_lost_group_among_itself() -> None:
    async def run() -> None:
        judge, _, _ = judging()
        first = [ask(judge, index, 1.0 + index) for index in range(GROUP)]
        assert [await sample_of(t) for t in first] == [(1.0 + i, [1, 2, 3]) for i in range(GROUP)]
        assert await sample_of(ask(judge, 1, 7.0)) == (7, [1, 3, 7])
        for index in range(GROUP):  # the queue leases a lost group whole
            judge.expect(index)
        again = [ask(judge, index, 10.0 + index) for index in range(GROUP)]
        assert [await sample_of(t) for t in again] == [(10.0 + i, [10, 11, 12]) for i in range(GROUP)]

    asyncio.run(run())


def test_after_the_run_went_back_nobody_of_before_takes_part() -> None:
    async def run() -> None:
        judge, rewards, _ = judging()
        rewards.may_answer.clear()
        for task in (before := [ask(judge, index, 1.0) for index in range(4)]):  # a group in judgement, one incomplete
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*before, return_exceptions=True)
        rewards.may_answer.set()
        for index in range(2 * GROUP):
            judge.expect(index)
        again = [ask(judge, index, 5.0 + index) for index in range(2 * GROUP)]
        assert await sample_of(again[0]) == (5, [5, 6, 7])
        assert await sample_of(again[3]) == (8, [8, 9, 10])

    asyncio.run(run())


def test_a_failed_call_fails_the_responses_that_wait_and_they_can_come_again() -> None:
    async def run() -> None:
        judge, rewards, _ = judging()
        rewards.failures = 1
        outcomes = await asyncio.gather(*(ask(judge, i, 1.0) for i in range(GROUP)), return_exceptions=True)
        assert [type(one) for one in outcomes] == [OpdlmError] * GROUP
        assert await sample_of([ask(judge, i, 2.0 + i) for i in range(GROUP)][-1]) == (4, [2, 3, 4])

    asyncio.run(run())


def test_a_response_that_comes_back_while_another_is_judged_does_not_wait_for_ever() -> None:
    async def run() -> None:
        judge, rewards, _ = judging()
        await asyncio.gather(*(ask(judge, i, 1.0 + i) for i in range(GROUP)))
        rewards.may_answer.clear()
        one = ask(judge, 0, 5.0)
        await asyncio.sleep(0.01)  # it is being judged
        other = ask(judge, 1, 6.0)
        await asyncio.sleep(0.01)
        rewards.may_answer.set()
        assert (await sample_of(one))[0] == 5
        assert await sample_of(other) == (6, [3, 5, 6])

    asyncio.run(run())


def test_groups_that_a_checkpoint_covers_are_forgotten() -> None:
    async def run() -> None:
        judge, _, _ = judging(kept=4)
        for prompt in range(20):
            await asyncio.gather(*(ask(judge, GROUP * prompt + i, 1.0 + i) for i in range(GROUP)))
        assert sorted(judge._groups) == [15, 16, 17, 18, 19]
        assert await sample_of(ask(judge, GROUP * 16, 9.0)) == (9, [2, 3, 9])

    asyncio.run(run())


@given(st.data())
@settings(max_examples=60)
def test_every_response_gets_an_answer_whatever_is_made_again(data) -> None:
    """In any order of arrivals, with members made again at any time; a sample is judged among exactly G rewards."""

    async def run() -> None:
        judge, _, _ = judging()
        newest: dict[int, asyncio.Task] = {}
        order = data.draw(st.permutations([i for i in range(2 * GROUP) for _ in range(data.draw(st.integers(1, 3)))]))
        for number, index in enumerate(order):
            if index in newest and not newest[index].done():
                newest[index].cancel()  # its task died, and another one makes it again
            newest[index] = ask(judge, index, float(number))
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
        for index, task in newest.items():
            reward, among = await sample_of(task)
            assert len(among) == GROUP, index
            assert reward in among, index

    asyncio.run(run())


def test_the_error_of_a_pool_without_actors_reaches_every_response() -> None:
    async def run() -> None:
        judge, rewards, _ = judging()
        rewards.failures = GROUP
        with pytest.raises(OpdlmError, match="the reward failed"):
            await asyncio.gather(*(ask(judge, i, 1.0) for i in range(GROUP)))

    asyncio.run(run())
