"""The driver's references to samples. `pytest tests/deploy/run/test_sample_references.py`"""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.samples import SampleRef, distinct_groups, sample_refs
from opdlm.deploy.run.sample_references import SampleReferences
from tests.patience import wait_until

N, ROUNDS = 16, 12


class Sample:
    """An object that a weak reference can point to, to see when it is freed."""


def test_samples_are_held_until_the_grace_time_after_a_checkpoint_is_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("opdlm.deploy.run.sample_references.time", SimpleNamespace(monotonic=lambda: now[0]))
    references = SampleReferences(prompts_per_round=2, grace_seconds=10.0)
    samples = [Sample() for _ in range(4)]
    watched = [weakref.ref(sample) for sample in samples]
    references.hold([3, 0], [SampleRef(samples[i], 0, 1, 1) for i in (3, 0)])
    references.hold([1, 2], [SampleRef(sample, 0, 1, 1) for sample in samples[1:3]])
    del samples

    references.committed(0)
    references.committed(1)
    gc.collect()
    assert all(sample() for sample in watched)  # the grace time has only begun
    now[0] += 10.0
    references.committed(1)
    gc.collect()
    assert [sample() is not None for sample in watched] == [False, False, True, True]


@ray.remote(num_cpus=0)
class Scorer:
    """Makes samples small enough that Ray keeps them in their owner's process."""

    def score(self, count: int) -> tuple[Any, ...]:
        return *[[np.zeros(500)] for _ in range(count)], None


@ray.remote(num_cpus=0)
class Rank:
    """Takes a round as a learner rank does."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def train(self, round_: int) -> int:
        samples, _ = ray.get(self.queue.take_round.remote(round_))
        return len(ray.get(distinct_groups(samples)))


@pytest.mark.ray
def test_values_of_trained_samples_leave_the_drivers_memory(ray_cluster):
    ray.init(address=os.environ["RAY_ADDRESS"], ignore_reinit_error=True)
    core = ray._private.worker.global_worker.core_worker
    before = core.get_memory_store_size()
    queue = ray.remote(ReplayQueueActor).options(num_cpus=0).remote(N, 0, N * ROUNDS, 0)
    scorer, rank = Scorer.remote(), Rank.remote(queue)
    references = SampleReferences(N, grace_seconds=1.0)
    for round_ in range(ROUNDS):
        ray.get(queue.publish.remote(round_, ["pack"], 8))
        ray.get(queue.weights_taken.remote(round_))
        indices = ray.get(queue.lease.remote(N))
        *groups, done = scorer.score.options(num_returns=N + 1).remote(N)
        ray.get(done)
        samples = sample_refs(groups, 1, [(1, 1)] * N)
        references.hold(indices, samples)
        answers = ray.get(queue.put.remote(indices, [round_] * len(indices), samples))
        assert answers == ["accepted"] * len(indices)
        del groups, samples, done  # from here on only the queue and `references` hold them
        assert ray.get(rank.train.remote(round_)) == N
        ray.get(queue.committed.remote(round_ + 1))

    def gone() -> bool:
        references.committed(ROUNDS)
        return core.get_memory_store_size() <= before + N

    wait_until(gone, "the samples to leave the driver's memory")
    for actor in (queue, scorer, rank):
        ray.kill(actor)
