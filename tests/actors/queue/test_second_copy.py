"""Where the second copy of the weights is held. `pytest tests/actors/queue/test_second_copy.py`"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from opdlm.actors.queue import second_copy
from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.queue.second_copy import SecondCopy, node_for_copy
from opdlm.common.weight_offer import WeightOffer

OFFER = WeightOffer("rank 0", "trainer", version=3, nbytes=100)


def nodes(**stores: float) -> list[dict[str, Any]]:
    """As `ray.nodes()` gives them. A store of 0: the node is dead, and had a large one."""
    return [
        {"NodeID": name, "Alive": size > 0, "Resources": {"object_store_memory": size or 1e9}}
        for name, size in stores.items()
    ]


@pytest.mark.parametrize(
    ("stores", "present", "expected"),
    [
        ({"head": 250, "trainer": 9000}, None, "head"),
        ({"head": 250, "trainer": 9000, "decoder": 800}, None, "decoder"),
        ({"head": 250, "trainer": 9000, "decoder": 800}, "head", "head"),
        ({"head": 250, "trainer": 9000, "decoder": 0}, "decoder", "head"),
        ({"head": 250, "trainer": 9000, "decoder": 800}, "trainer", "decoder"),
        ({"head": 199, "trainer": 9000}, None, None),
        ({"trainer": 9000}, None, None),
    ],
)
def test_the_copy_is_on_another_node_with_room(stores, present, expected) -> None:
    assert node_for_copy(nodes(**stores), OFFER, present) == expected


@pytest.fixture
def fake_ray(monkeypatch) -> SimpleNamespace:
    """Ray with a head, a trainer and a decoder; `held` has (node, pack) of each call of a holder."""
    fake = SimpleNamespace(held=[], started=[], stores={"head": 250, "trainer": 9000, "decoder": 800})

    def start(strategy) -> SimpleNamespace:
        node = strategy.node_id
        fake.started.append(node)

        async def hold(pack: list[Any]) -> None:
            fake.held.append((node, pack[0]))

        return SimpleNamespace(hold=SimpleNamespace(remote=hold))

    def options(scheduling_strategy) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: start(scheduling_strategy))

    context = SimpleNamespace(get_node_id=lambda: "head")
    monkeypatch.setattr(second_copy.ray, "nodes", lambda: nodes(**fake.stores))
    monkeypatch.setattr(second_copy.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(second_copy.ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(second_copy, "NodeAffinitySchedulingStrategy", lambda n, soft: SimpleNamespace(node_id=n))
    return fake


def test_one_holder_takes_version_after_version_until_its_node_dies(fake_ray, caplog) -> None:
    async def scenario() -> None:
        copy = SecondCopy()
        for version in range(3):
            await copy.keep(WeightOffer("rank 0", "trainer", version, 100), version)
        fake_ray.stores["decoder"] = 0
        await copy.keep(WeightOffer("rank 0", "trainer", 3, 100), 3)
        await copy.keep(WeightOffer("rank 0", "trainer", 4, 200), 4)
        await copy.keep(WeightOffer("rank 0", "trainer", 5, 100), 5)

    asyncio.run(scenario())
    assert fake_ray.started == ["decoder", "head", "head"]
    assert fake_ray.held == [("decoder", 0), ("decoder", 1), ("decoder", 2), ("head", 3), ("head", 5)]
    assert "version 4 have no second copy: no other node's object store has room for 2 x 200 bytes" in caplog.text


def test_there_is_none_where_the_rank_is_on_the_drivers_node(fake_ray) -> None:
    asyncio.run(SecondCopy().keep(WeightOffer("rank 0", "head", 0, 100), 0))
    assert fake_ray.started == []


def test_weights_of_an_older_version_take_nobody_elses_copy(fake_ray) -> None:
    """The node of rank 0 dies, and a restarted group publishes the version of its checkpoint from another node."""

    class Offer(WeightOffer):
        def collect(self):
            async def stored() -> None: ...

            return f"pack {self.version} of {self.node}", stored()

    async def scenario() -> None:
        queue = ReplayQueueActor(4, 1, 400, 0)
        for version in (9, 10):
            await queue.publish_offer(Offer("rank 0", "trainer", version, 100))
            await queue._copying
        for node in ("other", "head"):
            await queue.publish_offer(Offer("rank 0", node, 9, 100))
        assert queue._weights.version == 10
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert fake_ray.held == [("decoder", "pack 9 of trainer"), ("decoder", "pack 10 of trainer")]
