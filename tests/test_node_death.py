"""A node dies, in a cluster of two on this machine. `pytest tests/test_node_death.py`"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from actors.queue_actor import start_queue
from common.types import HiddenTargets, ScoredTrajectory, WeightPack
from learner.queue_client import QueueClient
from tests.tiny import trajectory

pytestmark = pytest.mark.ray


@pytest.fixture
def two_nodes(monkeypatch) -> Iterator[Cluster]:
    """A cluster of its own: a head of four logical CPUs, and a node of four that alone has the resource `second`."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    cluster.second = cluster.add_node(num_cpus=4, resources={"second": 4})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def scored(index: int) -> ScoredTrajectory:
    """A sample too large to travel inside a message: it lies in the store of the node that made it."""
    made = dataclasses.replace(trajectory([5, 6], [7, 8], [1, 2]), index=index)
    return ScoredTrajectory(made, HiddenTargets(np.zeros((8, 65536), np.float32)))


def test_samples_that_died_with_a_node_are_made_again(two_nodes) -> None:
    """Two of four samples lie on the node that dies; the learner waits for new ones and gets all four."""
    queue = start_queue(prompts_per_round=4, max_staleness=0, total=4, first_round=0)
    make = ray.remote(num_cpus=0, max_retries=0)(scored)  # as an actor's outputs, they are not made again by Ray
    ray.get(queue.publish.remote(0, WeightPack(0, (), {}, 0)))
    ray.get(queue.weights_taken.remote(0))
    assert ray.get(queue.lease.remote(4)) == [0, 1, 2, 3]
    there = {
        i: make.options(resources={"second": 1} if i in (1, 3) else {"node:__internal_head__": 0.1}) for i in range(4)
    }
    references = [there[i].remote(i) for i in range(4)]
    ray.wait(references, num_returns=4, fetch_local=False)
    ray.get(queue.put.remote([0, 1, 2, 3], 0, references))

    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    made_again = []

    def coordinate() -> None:
        while indices := ray.get(queue.lease.remote(1)):
            made_again.extend(indices)
            ray.get(queue.put.remote(indices, 0, [make.remote(i) for i in indices]))

    producing = threading.Thread(target=coordinate)
    producing.start()
    rank = QueueClient(queue, 0, timeout_seconds=120)
    taken, _ = rank.take_round(0)
    assert [s.trajectory.index for s in rank.fetch(taken, [3, 0, 1, 2], first_sample=0)] == [3, 0, 1, 2]
    ray.get(queue.learner_ended.remote())
    producing.join()
    assert sorted(made_again) == [1, 3]
    assert ray.get(queue.state.remote())["samples_made_again"] == 2
    ray.kill(queue)
