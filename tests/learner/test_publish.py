"""Publishing weights while the object store is full; messages to the queue. `pytest tests/learner/test_publish.py`"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.types import WeightPack
from opdlm.common.weight_offer import WeightOffer
from opdlm.common.weights import WeightPacker
from opdlm.learner.queue_client import QueueClient
from opdlm.learner.saving import GiveUp
from opdlm.learner.schedule import Progress
from opdlm.learner.worker import Learner
from tests.tiny import tiny_model

PACK = WeightPack(3, (), {}, 0)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Records the learner's pauses in seconds, without pausing."""
    seconds: list[float] = []
    monkeypatch.setattr("opdlm.learner.queue_client.time.sleep", seconds.append)
    return seconds


def publish(monkeypatch, answers: list[Exception | None], limit: float = 1800) -> list[WeightOffer]:
    """Publishes a pack to a queue that answers its calls with `answers` in turn; returns the offers it was given."""
    offers: list[WeightOffer] = []

    def get(reference: object, timeout: float) -> None:
        if error := answers[len(offers) - 1]:
            raise error

    monkeypatch.setattr("opdlm.learner.queue_client.ray.get", get)
    context = SimpleNamespace(current_actor="rank 0", get_node_id=lambda: "node")
    monkeypatch.setattr("opdlm.learner.queue_client.ray.get_runtime_context", lambda: context)
    queue = SimpleNamespace(publish_offer=SimpleNamespace(remote=offers.append))
    QueueClient(queue, 0, limit).publish(PACK)
    return offers


def test_it_waits_for_room(monkeypatch, waits) -> None:
    in_the_queue = RayTaskError("publish", "no room", OutOfDiskError("no room"))
    assert (
        publish(monkeypatch, [ObjectStoreFullError(), in_the_queue, None]) == [WeightOffer("rank 0", "node", 3, 0)] * 3
    )
    assert waits == [1.0, 2.0]


def test_it_does_not_wait_for_ever(monkeypatch, waits) -> None:
    with pytest.raises(OpdlmError, match=r"weights of version 3: Ray's object store and its disk were full for 0 s"):
        publish(monkeypatch, [ObjectStoreFullError()], limit=0)


def test_it_does_not_wait_after_other_errors(monkeypatch, waits) -> None:
    with pytest.raises(RayError, match="something else"):
        publish(monkeypatch, [RayTaskError("publish", "something else", ValueError("something else"))])
    assert waits == []


def test_steps_are_told_together_and_all_before_a_round(monkeypatch) -> None:
    """At most one message in 0.2 s holds only steps; any other record is sent at once, with the steps before it."""
    clock, told = [100.0], []
    monkeypatch.setattr("opdlm.learner.queue_client.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("opdlm.learner.queue_client.ray.get", lambda reference, timeout: None)
    written = SimpleNamespace(remote=lambda: told.append("written"))
    queue = QueueClient(SimpleNamespace(tell=SimpleNamespace(remote=told.append), events_written=written), 0, 60)

    def step(number: int, at: float) -> None:
        clock[0] = 100 + at
        queue.tell({"kind": "step", "step": number})

    for number, at in enumerate((0.0, 0.1, 0.15, 0.25, 0.3)):
        step(number, at)
    queue.tell({"kind": "round", "step": 4})
    step(5, 0.35)
    queue.wait_until_written()
    queue.wait_until_written()
    steps = [message if message == "written" else [event["step"] for event in message] for message in told]
    assert steps == [[0], [1, 2, 3], [4, 4], [5], "written", "written"]
    assert all(event["told_at"] for message in told if message != "written" for event in message)


@pytest.mark.parametrize("rank", [0, 1])
def test_broken_weights_are_not_published(rank) -> None:
    """Every rank sees the same weights, so every rank gives up, and none waits for another."""
    model, published = tiny_model(1), []
    learner = Learner.__new__(Learner)
    learner.rank, learner.progress, learner.packer = rank, Progress(rounds=3), WeightPacker()
    learner.config = OpdlmConfig.model_validate({"model": {"teacher": "t"}, "data": {"task": "chain"}})
    learner.schedule = SimpleNamespace(rounds=9)
    learner.queue = SimpleNamespace(publish=published.append, tell=lambda event: None)
    learner.engine = SimpleNamespace(module=SimpleNamespace(student=model))
    assert (learner._publish() is None) == (rank == 1)
    assert len(published) == (rank == 0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        GiveUp, match=r"weights of version 3: model.layers.1.mlp.down_proj.weight holds NaN or infinity"
    ):
        learner._publish()
    assert len(published) == (rank == 0)
