"""The queue actor's waiting methods, without Ray. `pytest tests/actors/queue/test_actor.py`"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.samples import SampleRef


def test_a_full_queue_blocks_leasing_until_weights_are_taken() -> None:
    """This is the back-pressure on decoding."""

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=0, total=4, first_round=0)
        waiting = asyncio.create_task(actor.lease(9))
        await asyncio.sleep(0)
        assert not waiting.done(), "nothing may be decoded before the first weights are taken"
        await actor.publish(0, ["pack 0"], 8)
        await actor.weights_taken(0)
        assert await waiting == [0, 1]
        blocked = asyncio.create_task(actor.lease(9))
        assert await actor.put([0, 1], [0, 0], ["a", "b"]) == ["accepted", "accepted"]
        samples, staleness = await actor.take_round(0)
        assert (samples, staleness) == (["a", "b"], [0, 0])
        await actor.publish(1, ["pack 1"], 8)
        await asyncio.sleep(0)
        assert not blocked.done(), "the slots are free only once the new weights were taken"
        await actor.weights_taken(1)
        assert await blocked == [2, 3]
        last = asyncio.create_task(actor.lease(9))
        await asyncio.sleep(0)
        assert not last.done(), "no new sample is left, but one may still be lost"
        await actor.learner_ended()
        assert await last == []

    asyncio.run(scenario())


def test_state_counts_slots_in_use_and_the_wait_of_samples(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("opdlm.actors.queue.actor.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=1, total=6, first_round=1)
        assert (await actor.state())["queue_slots_in_use"] == 0
        await actor.weights_taken(1)
        await actor.lease(3)
        for index, second in ((2, 101.0), (3, 105.0), (2, 109.0)):  # the last is a duplicate
            now[0] = second
            await actor.put([index], [1], ["sample"])
        now[0] = 107.0
        await actor.take_round(1)
        now[0] = 999.0
        await actor.take_round(1)  # another rank, or the same one again: it does not change the wait
        state = await actor.state()
        assert state["queue_wait_seconds_mean"] == pytest.approx((6 + 2) / 2)
        assert (state["queue_slots_in_use"], state["queue_leased"]) == (3, 1), "training uses slots until a push"
        await actor.publish(2, ["pack 2"], 8)
        await actor.weights_taken(2)
        assert (await actor.state())["queue_slots_in_use"] == 1

    asyncio.run(scenario())


def test_after_a_stop_a_begun_round_is_finished_on_every_rank() -> None:
    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=1, max_staleness=1, total=4, first_round=0)
        await actor.publish(0, ["pack 0"], 8)
        await actor.weights_taken(0)
        await actor.lease(2)
        await actor.put([0, 1], [0, 0], ["a", "b"])
        assert (await actor.take_round(0))[0] == ["a"]
        await actor.request_stop()
        assert (await actor.take_round(0))[0] == ["a"], "the second rank must get what the first one got"
        assert await actor.take_round(1) is None, "no rank has begun this round, though it is ready"
        assert await actor.next_weights(after=-1) is not None
        await actor.learner_ended()
        assert await actor.lease(1) == []
        assert await actor.next_weights(after=0) is None
        assert await actor.take_events(60) is None

    asyncio.run(scenario())


def test_after_a_stop_a_begun_round_waits_for_its_lost_sample() -> None:
    """A node died, then a stop was requested, and then the learner's worker group restarted."""

    async def scenario() -> None:
        queue = ReplayQueueActor(2, 0, 4, 0)
        await queue.publish(0, ["pack 0"], 8)
        await queue.weights_taken(0)
        await queue.put(await queue.lease(2), [0, 0], ["a", "b"])
        await queue.take_round(0)
        replacing = asyncio.create_task(queue.remade_sample(1, "b"))
        await asyncio.sleep(0)
        await queue.request_stop()
        again = asyncio.create_task(queue.take_round(0))
        await asyncio.sleep(0.01)
        assert not again.done()
        assert await queue.lease(2) == [1]
        await queue.put([1], [0], ["new b"])
        assert await again == (["a", "new b"], [0, 0])
        assert await replacing == "new b"
        assert await queue.take_round(1) is None

    asyncio.run(scenario())


def test_a_checkpoint_waits_until_its_events_are_written() -> None:
    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=1, max_staleness=0, total=4, first_round=0)
        await actor.events_written()  # there are none
        await actor.tell([{"step": 1}])
        waiting = asyncio.create_task(actor.events_written())
        assert await actor.take_events(60) == [{"step": 1}]
        await asyncio.sleep(0)
        assert not waiting.done(), "the driver has received the event, but may not have written it"
        asking_again = asyncio.create_task(actor.take_events(60))
        await waiting
        await actor.tell([{"step": 2}])
        assert await asking_again == [{"step": 2}]
        waiting = asyncio.create_task(actor.events_written())
        await asyncio.sleep(0)
        assert not waiting.done()
        await actor.driver_stops_listening()  # the driver's loop has failed: the last checkpoint must not wait for it
        await waiting

    asyncio.run(scenario())


def test_weights_again_waits_until_the_lost_version_is_published_again() -> None:
    """A restarted learner first publishes older versions, which change nothing, and later the lost one."""

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=0, total=4, first_round=0)
        for version in (0, 1):
            await actor.publish(version, [f"reference {version}"], 8)
        lost = await actor.next_weights(0)
        assert (lost.version, lost.pack) == (1, ["reference 1"])
        waiting = [asyncio.create_task(actor.republished_weights(lost)) for _ in range(2)]
        await actor.publish(0, ["reference 0 again"], 8)
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await actor.publish(1, ["reference 1 again"], 8)
        assert [(await task).pack for task in waiting] == [["reference 1 again"]] * 2
        again = await actor.republished_weights(lost)  # a caller that finds the loss later need not wait
        last = asyncio.create_task(actor.republished_weights(again))
        await actor.learner_ended()
        assert await last is None

    asyncio.run(scenario())


def test_all_responses_to_a_prompt_that_were_in_a_lost_list_are_made_again() -> None:
    """Those that have another list stay."""

    async def run() -> None:
        queue = ReplayQueueActor(6, 0, 6, 0, 3)
        await queue.weights_taken(0)
        samples = [SampleRef(group, 0, 1, 1) for group in "aaxabb"]
        await queue.put(await queue.lease(6), [0] * 6, samples)
        remaking = asyncio.create_task(queue.remade_sample(1, samples[1]))
        await asyncio.sleep(0)
        assert await queue.lease(1) == [1, 0]
        await queue.put([0, 1], [0, 0], [SampleRef("c", place, 1, 1) for place in range(2)])
        assert (await remaking).group == "c"

    asyncio.run(run())
