"""An actor that publishes weights as a rank of the learner does, with real Ray and without a model."""

from __future__ import annotations

import threading
from typing import Any

import ray
import torch

from opdlm.common.weights import WeightPacker
from opdlm.learner.queue_client import QueueClient
from tests.patience import PATIENCE


@ray.remote(num_cpus=0)
class Rank:
    """Publishes from a thread, as a rank of Ray Train does."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.done = QueueClient(queue, 0, PATIENCE), threading.Event()
        self.weights = torch.arange(1 << 16, dtype=torch.float32)  # more than Ray keeps outside its object store

    def start(self) -> None:
        threading.Thread(target=self._publish).start()

    def finished(self) -> bool:
        return self.done.is_set()

    def _publish(self) -> None:
        self.queue.publish(WeightPacker().pack(0, [("weight", self.weights)]))
        self.weights.zero_()  # the published pack is a copy
        self.done.set()
