"""Publishing weights while the object store is full. `pytest tests/learner/test_publish.py`"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from common.errors import OpdlmError
from common.types import WeightPack
from learner.queue_client import QueueClient

PACK = WeightPack(3, (), {}, 0)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The learner's pauses, which take no time."""
    seconds: list[float] = []
    monkeypatch.setattr("learner.queue_client.time.sleep", seconds.append)
    return seconds


def publish(monkeypatch, answers: list[Exception | None], limit: float = 1800) -> list[WeightPack]:
    """One rank's way to publish, without a model; what the queue was given, each time with the next answer."""
    given: list[WeightPack] = []

    def get(reference: object, timeout: float) -> None:
        if error := answers[len(given) - 1]:
            raise error

    monkeypatch.setattr("learner.queue_client.ray.get", get)
    queue = SimpleNamespace(publish=SimpleNamespace(remote=lambda version, pack: given.append(pack)))
    QueueClient(queue, 0, limit).publish(PACK)
    return given


def test_it_waits_for_room(monkeypatch, waits) -> None:
    in_the_queue = RayTaskError("publish", "no room", OutOfDiskError("no room"))
    assert publish(monkeypatch, [ObjectStoreFullError(), in_the_queue, None]) == [PACK] * 3
    assert waits == [1.0, 2.0]


def test_it_does_not_wait_for_ever(monkeypatch, waits) -> None:
    with pytest.raises(OpdlmError, match=r"weights of version 3: Ray's object store and its disk were full for 0 s"):
        publish(monkeypatch, [ObjectStoreFullError()], limit=0)


def test_other_errors_are_no_matter_of_room(monkeypatch, waits) -> None:
    with pytest.raises(RayError, match="something else"):
        publish(monkeypatch, [RayTaskError("publish", "something else", ValueError("something else"))])
    assert waits == []
