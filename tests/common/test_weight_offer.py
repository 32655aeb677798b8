"""Weights that a rank offers to the queue, with real Ray. `pytest tests/common/test_weight_offer.py`"""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.common.types import WeightPack
from tests.fakes.publisher import Rank
from tests.patience import PATIENCE

pytestmark = pytest.mark.ray


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
