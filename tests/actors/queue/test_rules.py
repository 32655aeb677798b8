"""Invariants of the queue under random schedules, without Ray. `pytest tests/actors/queue/test_rules.py`

The state machine acts as driver, actors and learner in any order that the interface allows, with duplicates, late
samples, lost samples, learner restarts and checkpoints. After each action it checks that no sample is lost, trained
twice or too stale.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opdlm.actors.queue.rules import ReplayQueue


class QueueMachine(RuleBasedStateMachine):
    """Calls a `ReplayQueue` at random and keeps its own account of every sample."""

    @initialize(n=st.integers(1, 5), staleness=st.integers(0, 3), total=st.integers(1, 23), first=st.integers(0, 2))
    def start(self, n: int, staleness: int, total: int, first: int) -> None:
        first = min(first, -(-total // n))
        self.queue = ReplayQueue(n, staleness, total, first)
        self.first = first
        self.decoding: dict[int, int] = {}  # index -> weight version that decodes it
        self.accepted: dict[int, int] = {}  # index -> weight version that decoded it
        self.learner_round = first
        self.checkpointed = first
        self.published = first
        self.trained: dict[int, int] = {}  # index -> how often it was trained in the weights that survive
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
        assert self.queue.put(index, version, f"sample {index}") == "accepted"
        self.accepted[index] = version

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def finish_twice(self, data) -> None:
        index = data.draw(st.sampled_from(sorted(self.accepted)))
        refused = self.queue.refused["duplicate"]
        assert self.queue.put(index, self.accepted[index], "again") == "duplicate"
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
        """The node that held a sample dies. The sample is made again, even if the learner has trained it already."""
        kept = [i for i in self.accepted if i // self.queue.prompts_per_round >= self.checkpointed]
        index = data.draw(st.sampled_from(sorted(kept)))
        assert self.queue.lose(index, f"sample {index}")
        assert not self.queue.lose(index, f"sample {index}"), "a second rank reports the same loss"
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
        """The learner goes back to the last checkpoint; what it trained since then does not survive."""
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
        assert len(in_use) <= slots, "more samples are in use than there are slots"
        for round_ in range(self.checkpointed, queue.rounds):
            if all(i in self.accepted for i in queue.indices_of(round_)):
                assert queue.is_ready(round_), "the queue forgot a sample that no checkpoint covers"

    def teardown(self) -> None:
        """From any state, an undisturbed rest of the run trains every sample exactly once."""
        if not hasattr(self, "queue"):
            return
        for _ in range(10 * self.queue.rounds + 10):
            self.push_weights()
            self.lease(100)
            for index in sorted(self.decoding):
                assert self.queue.put(index, self.decoding[index], f"sample {index}") == "accepted"
                self.accepted[index] = self.decoding[index]
            self.decoding = {}
            while self.learner_round < self.queue.rounds and self.queue.is_ready(self.learner_round):
                self.train_round()
        assert self.learner_round == self.queue.rounds, "the run did not get to its end"
        expected = set(range(min(self.first * self.queue.prompts_per_round, self.queue.total), self.queue.total))
        assert {i for i, times in self.trained.items() if times == 1} == expected


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40)


def test_stale_samples_are_refused_and_counted() -> None:
    queue = ReplayQueue(prompts_per_round=1, max_staleness=1, total=5)
    queue.weights_taken(0)
    assert queue.lease(5) == [0, 1]
    queue.put(0, 0, "a")
    queue.take_round(0)
    queue.published(1)
    queue.weights_taken(1)
    assert queue.lease(5) == [2]
    assert queue.put(2, 0, "decoded with weights two rounds old") == "stale"
    assert queue.refused["stale"] == 1
    assert queue.put(2, 1, "decoded again") == "accepted"


def test_misuse_is_named() -> None:
    queue = ReplayQueue(2, 0, 4)
    with pytest.raises(ValueError, match="version 1 was taken but only 0 was published"):
        queue.weights_taken(1)
    with pytest.raises(ValueError, match="round 0 is not ready"):
        queue.take_round(0)


def test_an_end_after_the_round_leases_and_takes_nothing_of_later_rounds() -> None:
    queue = ReplayQueue(prompts_per_round=2, max_staleness=2, total=10)
    queue.weights_taken(0)
    queue.lease(1)
    queue.stop_after_round()
    assert queue.lease(9) == [1], "the rest of the round is still made"
    assert not queue.ends_before(0)
    assert queue.ends_before(1)
    queue.published(1)
    queue.weights_taken(1)
    queue.stop_after_round()
    assert queue.lease(9) == [], "asking again changes nothing"


def test_only_the_first_end_says_whether_the_run_is_finished() -> None:
    finished, stopped = ReplayQueue(2, 0, 10), ReplayQueue(2, 0, 10)
    finished.stop(finish=True)
    finished.stop(finish=False)
    stopped.stop_after_round()
    stopped.stop(finish=True)
    assert (finished.ends_early, stopped.ends_early) == (True, False)
    last = ReplayQueue(2, 0, 2)
    last.stop_after_round()  # the last round is being made, so this asks for nothing
    last.stop(finish=True)
    assert last.ends_early


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_responses_to_a_prompt_are_leased_together(group, prompts, data) -> None:
    queue = ReplayQueue(group * prompts, 1, 5 * group * prompts, group=group)
    queue.weights_taken(0)
    leased: list[int] = []
    while indices := queue.lease(data.draw(st.integers(1, 9))):
        assert len(indices) % group == 0
        assert [i // group * group for i in indices[::group]] == indices[::group]
        leased += indices
    assert leased == list(range(2 * group * prompts))
    for index in leased:
        queue.put(index, 0, index)
    lost = data.draw(st.permutations(leased))
    for index in lost:
        queue.lose(index, index)
    again = []
    while indices := queue.lease(data.draw(st.integers(1, 9))):
        assert {i // group for i in indices}.isdisjoint(i // group for i in again), "a lost group comes whole"
        again += indices
    assert sorted(again) == leased
