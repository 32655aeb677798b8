"""Weights that a rank offers to the queue, with real Ray. `pytest tests/common/test_weight_offer.py`"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
import ray
import torch

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.types import WeightPack
from opdlm.common.weights import WeightPacker
from opdlm.learner.queue_client import QueueClient
from tests.patience import PATIENCE

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Rank:
    """Publishes from a thread, as a rank of Ray Train does."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.done = QueueClient(queue, 0, 60.0), threading.Event()
        self.weights = torch.arange(1 << 16, dtype=torch.float32)  # more than Ray keeps outside its object store

    def start(self) -> None:
        threading.Thread(target=self._publish).start()

    def finished(self) -> bool:
        return self.done.is_set()

    def _publish(self) -> None:
        self.queue.publish(WeightPacker().pack(0, [("weight", self.weights)]))
        self.weights.zero_()  # the published pack is a copy
        self.done.set()


def test_a_pack_outlives_the_rank_that_offered_it(ray_cluster) -> None:
    ray.init(address=os.environ["RAY_ADDRESS"], ignore_reinit_error=True)
    queue = ray.remote(ReplayQueueActor).options(num_cpus=0).remote(1, 0, 1, 0)
    rank = Rank.remote(queue)
    ray.get(rank.start.remote())
    handle = ray.get(queue.next_weights.remote(-1), timeout=PATIENCE)
    while not ray.get(rank.finished.remote()):
        pass
    ray.kill(rank)
    pack: WeightPack = ray.get(handle.pack[0], timeout=PATIENCE)
    assert (handle.version, handle.nbytes) == (0, 4 << 16)
    assert np.array_equal(pack.buffers["float32"], np.arange(1 << 16, dtype=np.float32))
    ray.kill(queue)
