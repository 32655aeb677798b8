"""Queue invariants under random schedules, without Ray. `pytest tests/actors/queue/test_rules.py`

The machine plays coordinator, actors and learner in any order that the interface allows, with duplicates, late
samples, learner restarts and checkpoints, and checks after each move that nothing is lost, doubled or too stale.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.queue.rules import ReplayQueue


class QueueMachine(RuleBasedStateMachine):
    @initialize(n=st.integers(1, 5), staleness=st.integers(0, 3), total=st.integers(1, 23), first=st.integers(0, 2))
    def start(self, n: int, staleness: int, total: int, first: int) -> None:
        first = min(first, -(-total // n))
        self.queue = ReplayQueue(n, staleness, total, first)
        self.first = first
        self.decoding: dict[int, int] = {}  # index -> version it is decoded with
        self.accepted: dict[int, int] = {}
        self.learner_round = first
        self.checkpointed = first
        self.published = first
        self.trained: dict[int, int] = {}  # index -> times in the surviving weights
        self.leased: list[int] = []

    @rule(most=st.integers(1, 7))
    def lease(self, most: int) -> None:
        indices = self.queue.lease(most)
        assert len(indices) <= most
        self.leased += [index for index in indices if index not in self.leased]
        for index in indices:
            self.decoding[index] = self.queue.version

    @precondition(lambda self: self.decoding)
    @rule(data=st.data())
    def finish(self, data) -> None:
        index = data.draw(st.sampled_from(sorted(self.decoding)))
        version = self.decoding.pop(index)
        assert self.queue.put(index, version, f"sample {index}")
        self.accepted[index] = version

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def finish_twice(self, data) -> None:
        index = data.draw(st.sampled_from(sorted(self.accepted)))
        refused = self.queue.refused["duplicate"]
        assert not self.queue.put(index, self.accepted[index], "again")
        assert self.queue.refused["duplicate"] == refused + 1

    @precondition(lambda self: self.learner_round < self.queue.rounds and self.queue.is_ready(self.learner_round))
    @rule()
    def train_round(self) -> None:
        round_ = self.learner_round
        samples = self.queue.take_round(round_)
        assert samples == [f"sample {i}" for i in self.queue.indices_of(round_)]
        assert all(s <= self.queue.max_staleness for s in self.queue.staleness(round_))
        for index in self.queue.indices_of(round_):
            self.trained[index] = self.trained.get(index, 0) + 1
        self.learner_round += 1
        self.published = max(self.published, self.learner_round)
        self.queue.published(self.learner_round)

    @precondition(lambda self: any(i // self.queue.prompts_per_round >= self.checkpointed for i in self.accepted))
    @rule(data=st.data())
    def data_dies(self, data) -> None:
        """The node that held a sample dies. Its place is made again, whatever the learner has done with it."""
        kept = [i for i in self.accepted if i // self.queue.prompts_per_round >= self.checkpointed]
        index = data.draw(st.sampled_from(sorted(kept)))
        assert self.queue.lose(index, f"sample {index}")
        assert not self.queue.lose(index, f"sample {index}"), "the second rank that misses it"
        del self.accepted[index]

    @rule()
    def push_weights(self) -> None:
        before = self.queue.version
        self.queue.weights_taken(self.published)
        assert before is None or self.queue.version >= before

    @rule()
    def checkpoint(self) -> None:
        self.checkpointed = self.learner_round
        self.queue.committed(self.checkpointed)

    @rule()
    def learner_dies(self) -> None:
        """It goes back to the last checkpoint; what it trained since does not survive."""
        for round_ in range(self.checkpointed, self.learner_round):
            for index in self.queue.indices_of(round_):
                self.trained[index] -= 1
        self.learner_round = self.checkpointed

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        assert self.leased == list(
            range(self.first * queue.prompts_per_round, self.first * queue.prompts_per_round + len(self.leased))
        )
        assert all(times in (0, 1) for times in self.trained.values())
        done = {i for i, times in self.trained.items() if times}
        assert done == {i for r in range(self.first, self.learner_round) for i in queue.indices_of(r)}
        slots = (queue.max_staleness + 1) * queue.prompts_per_round
        begun = queue.version if queue.version is not None else self.first
        in_use = [i for i in self.leased if queue.round_of(i) >= begun]
        assert len(in_use) <= slots, "more samples on the way than there are slots"
        for round_ in range(self.checkpointed, queue.rounds):
            if all(i in self.accepted for i in queue.indices_of(round_)):
                assert queue.is_ready(round_), "a sample that no checkpoint covers was forgotten"

    def teardown(self) -> None:
        """From any state, an orderly end trains every sample exactly once."""
        if not hasattr(self, "queue"):
            return
        for _ in range(10 * self.queue.rounds + 10):
            self.push_weights()
            self.lease(100)
            for index in sorted(self.decoding):
                assert self.queue.put(index, self.decoding[index], f"sample {index}")
                self.accepted[index] = self.decoding[index]
            self.decoding = {}
            while self.learner_round < self.queue.rounds and self.queue.is_ready(self.learner_round):
                self.train_round()
        assert self.learner_round == self.queue.rounds, "the loop stopped before the run's end"
        expected = set(range(min(self.first * self.queue.prompts_per_round, self.queue.total), self.queue.total))
        assert {i for i, times in self.trained.items() if times == 1} == expected


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_stale_samples_are_refused_and_counted() -> None:
    queue = ReplayQueue(prompts_per_round=1, max_staleness=1, total=5)
    queue.weights_taken(0)
    assert queue.lease(5) == [0, 1]
    queue.put(0, 0, "a")
    queue.take_round(0)
    queue.published(1)
    queue.weights_taken(1)
    assert queue.lease(5) == [2]
    assert not queue.put(2, 0, "decoded with weights two rounds old")
    assert queue.refused["stale"] == 1
    assert queue.put(2, 1, "decoded again")


def test_misuse_is_named() -> None:
    queue = ReplayQueue(2, 0, 4)
    with pytest.raises(ValueError, match="version 1 was taken but only 0 was published"):
        queue.weights_taken(1)
    with pytest.raises(ValueError, match="round 0 is not ready"):
        queue.take_round(0)


def test_full_queue_holds_the_producer_until_weights_are_taken() -> None:
    """Back-pressure, through the actor's waiting methods."""

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=0, total=4, first_round=0)
        waiting = asyncio.create_task(actor.lease(9))
        await asyncio.sleep(0)
        assert not waiting.done(), "nothing may be decoded before the first weights"
        await actor.publish(0, ["pack 0"], 8)
        await actor.weights_taken(0)
        assert await waiting == [0, 1]
        blocked = asyncio.create_task(actor.lease(9))
        assert await actor.put([0, 1], 0, ["a", "b"]) == [True, True]
        samples, staleness = await actor.take_round(0)
        assert (samples, staleness) == (["a", "b"], [0, 0])
        await actor.publish(1, ["pack 1"], 8)
        await asyncio.sleep(0)
        assert not blocked.done(), "the slots are free only once the new weights were taken"
        await actor.weights_taken(1)
        assert await blocked == [2, 3]
        last = asyncio.create_task(actor.lease(9))
        await asyncio.sleep(0)
        assert not last.done(), "nothing is left, but samples may yet be lost"
        await actor.learner_ended()
        assert await last == []

    asyncio.run(scenario())


def test_slots_in_use_and_the_wait_of_samples(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("opdlm.actors.queue.actor.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=1, total=6, first_round=1)
        assert (await actor.state())["queue_slots_in_use"] == 0
        await actor.weights_taken(1)
        await actor.lease(3)
        for index, second in ((2, 101.0), (3, 105.0), (2, 109.0)):  # the last is a duplicate
            now[0] = second
            await actor.put([index], 1, ["sample"])
        now[0] = 107.0
        await actor.take_round(1)
        now[0] = 999.0
        await actor.take_round(1)  # the other rank, or the same one again: they waited no longer
        state = await actor.state()
        assert state["queue_wait_seconds_mean"] == pytest.approx((6 + 2) / 2)
        assert (state["queue_slots_in_use"], state["queue_leased"]) == (3, 1), "in training counts, until a push"
        await actor.publish(2, ["pack 2"], 8)
        await actor.weights_taken(2)
        assert (await actor.state())["queue_slots_in_use"] == 1

    asyncio.run(scenario())


def test_stop_lets_a_begun_round_finish_on_every_rank() -> None:
    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=1, max_staleness=1, total=4, first_round=0)
        await actor.publish(0, ["pack 0"], 8)
        await actor.weights_taken(0)
        await actor.lease(2)
        await actor.put([0, 1], 0, ["a", "b"])
        assert (await actor.take_round(0))[0] == ["a"]
        await actor.request_stop()
        assert (await actor.take_round(0))[0] == ["a"], "the second rank must get what the first was given"
        assert await actor.take_round(1) is None, "no rank has begun this round, though it is ready"
        assert await actor.next_weights(after=-1) is not None
        await actor.learner_ended()
        assert await actor.lease(1) == []
        assert await actor.next_weights(after=0) is None
        assert await actor.drain_events(60) is None

    asyncio.run(scenario())


def test_a_begun_round_waits_for_a_lost_sample_after_a_stop_too() -> None:
    """A node died, a stop came, and then the learner's group began again."""

    async def scenario() -> None:
        queue = ReplayQueueActor(2, 0, 4, 0)
        await queue.publish(0, ["pack 0"], 8)
        await queue.weights_taken(0)
        await queue.put(await queue.lease(2), 0, ["a", "b"])
        await queue.take_round(0)
        replacing = asyncio.create_task(queue.replace(1, "b"))
        await asyncio.sleep(0)
        await queue.request_stop()
        again = asyncio.create_task(queue.take_round(0))
        await asyncio.sleep(0.01)
        assert not again.done()
        assert await queue.lease(2) == [1]
        await queue.put([1], 0, ["new b"])
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
        assert await actor.drain_events(60) == [{"step": 1}]
        await asyncio.sleep(0)
        assert not waiting.done(), "handed over is not yet written"
        asking_again = asyncio.create_task(actor.drain_events(60))
        await waiting
        await actor.tell([{"step": 2}])
        assert await asking_again == [{"step": 2}]
        waiting = asyncio.create_task(actor.events_written())
        await asyncio.sleep(0)
        assert not waiting.done()
        await actor.nobody_listens()  # the coordinator's loop failed: the last checkpoint is not held up
        await waiting

    asyncio.run(scenario())


def test_weights_that_died_with_the_learner_are_waited_for() -> None:
    """A restarted learner begins with older ones, which change nothing, and comes to them again."""

    async def scenario() -> None:
        actor = ReplayQueueActor(prompts_per_round=2, max_staleness=0, total=4, first_round=0)
        for version in (0, 1):
            await actor.publish(version, [f"reference {version}"], 8)
        lost = await actor.next_weights(0)
        assert (lost.version, lost.pack) == (1, ["reference 1"])
        waiting = [asyncio.create_task(actor.weights_again(lost)) for _ in range(2)]
        await actor.publish(0, ["reference 0 again"], 8)
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await actor.publish(1, ["reference 1 again"], 8)
        assert [(await task).pack for task in waiting] == [["reference 1 again"]] * 2
        again = await actor.weights_again(lost)  # who notices later need not wait
        last = asyncio.create_task(actor.weights_again(again))
        await actor.learner_ended()
        assert await last is None

    asyncio.run(scenario())
