"""A node dies that holds weights or samples, in a cluster of two nodes. `pytest tests/system/test_node_death.py`"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import ray

from opdlm.actors.queue.actor import start_queue
from opdlm.common.samples import SampleRef
from opdlm.common.types import HiddenTargets, ScoredTrajectory
from opdlm.learner.queue_client import QueueClient
from opdlm.learner.round_samples import RoundSamples
from tests.fakes.publisher import Rank
from tests.patience import PATIENCE, wait_until
from tests.tiny import trajectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def scored(*indices: int) -> list[ScoredTrajectory]:
    """Samples that are too large to travel inside a message, so they stay in the store of the node that made them."""
    made = [dataclasses.replace(trajectory([5, 6], [7, 8], [1, 2]), index=index) for index in indices]
    return [ScoredTrajectory(t, HiddenTargets(np.zeros((8, 65536), np.float32))) for t in made]


def test_weights_outlive_the_node_of_the_rank_that_published_them(two_nodes) -> None:
    """The queue has another node hold a copy: nothing here reads them before the rank's node dies."""
    queue = start_queue(prompts_per_round=1, max_staleness=0, total=1, first_round=0)
    rank = Rank.options(resources={"second": 1}).remote(queue)
    ray.get(rank.start.remote())
    handle = ray.get(queue.next_weights.remote(-1), timeout=PATIENCE)

    def copies() -> int:
        return len(ray.experimental.get_object_locations(handle.pack)[handle.pack[0]]["node_ids"])

    wait_until(lambda: copies() == 2, "a second copy")
    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    pack = ray.get(handle.pack[0], timeout=PATIENCE)
    assert np.array_equal(pack.buffers["float32"], np.arange(1 << 16, dtype=np.float32))
    ray.kill(queue)


def test_samples_that_were_lost_with_a_node_are_made_again(two_nodes) -> None:
    """Three of five samples are on the node that dies, two of them share a reference; the learner gets all five."""
    queue = start_queue(prompts_per_round=5, max_staleness=0, total=5, first_round=0)
    make = ray.remote(num_cpus=0, max_retries=0)(scored)  # Ray makes them again no more than it does actors' outputs
    ray.get(queue.publish.remote(0, ["pack"], 8))
    ray.get(queue.weights_taken.remote(0))
    assert ray.get(queue.lease.remote(5)) == [0, 1, 2, 3, 4]
    here, there = (make.options(resources=r) for r in ({"node:__internal_head__": 0.1}, {"second": 1}))
    groups = [here.remote(0), there.remote(1, 2), there.remote(3), here.remote(4)]
    ray.wait(groups, num_returns=4, fetch_local=False)
    places = [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)]
    ray.get(queue.put.remote([0, 1, 2, 3, 4], [0] * 5, [SampleRef(groups[g], place, 2, 2) for g, place in places]))

    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    made_again = []

    def produce() -> None:
        while indices := ray.get(queue.lease.remote(1)):
            made_again.extend(indices)
            ray.get(queue.put.remote(indices, [0], [SampleRef(make.remote(i), 0, 2, 2) for i in indices]))

    producing = threading.Thread(target=produce)
    producing.start()
    rank = QueueClient(queue, 0, timeout_seconds=PATIENCE)
    taken, _ = rank.take_round(0)
    samples = RoundSamples(taken, 0, rank)
    assert [s.trajectory.index for s in samples.fetch([3, 0, 1])] == [3, 0, 1]
    assert [s.trajectory.index for s in samples.fetch([2, 4])] == [2, 4]
    ray.get(queue.learner_ended.remote())
    producing.join()
    assert sorted(made_again) == [1, 2, 3]
    assert ray.get(queue.state.remote())["samples_made_again"] == 3
    ray.kill(queue)
