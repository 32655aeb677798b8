"""Long work with one actor of a pool, and calls that are chosen late. `pytest tests/actors/test_members.py`"""

from __future__ import annotations

import asyncio

import pytest

from opdlm.actors.members import ActorGone
from tests.actors.test_pool import FakeActor, pool_of
from tests.patience import PATIENCE


def test_whoever_holds_an_actor_may_call_it_until_he_lets_go(monkeypatch) -> None:
    killed: list[FakeActor] = []
    monkeypatch.setattr("opdlm.actors.members.ray.kill", killed.append)
    monkeypatch.setattr("opdlm.actors.members._LONGEST_PAUSE_SECONDS", 0.001)

    async def scenario() -> None:
        one, two, changes = FakeActor("one"), FakeActor("two"), []
        pool, _ = pool_of(one, two)
        pool.on_change = lambda: changes.append(pool.ready_names)
        with pool.hold("one"):
            retiring = asyncio.create_task(pool.retire("one"))
            await asyncio.sleep(0.01)
            assert (changes, killed) == ([["two"]], []), "it gets nothing more, and lives"
            assert (await pool.call_on("one", "work", 1))[1] == (1, "one")
        await retiring
        assert killed == [one]
        with pytest.raises(ActorGone):
            await pool.call_on("one", "work", 1)
        two.die()
        with pytest.raises(ActorGone):
            await pool.call_on("two", "work", 1)
        assert pool.life("two") == 1
        await asyncio.wait_for(pool.until_ready(), PATIENCE)
        assert changes[-1] == ["two"], "it is back"

    asyncio.run(scenario())


def test_what_a_call_is_about_is_chosen_when_an_actor_is_free() -> None:
    async def scenario() -> None:
        one = FakeActor("one")
        pool, _ = pool_of(one)
        one.hold = asyncio.Event()
        first = asyncio.create_task(pool.call("work", 0))
        left = [1]
        late = [
            asyncio.create_task(pool.call_late("work", lambda: ((left.pop(),), 0) if left else None)) for _ in range(2)
        ]
        await asyncio.sleep(0.01)
        left[:] = [7]
        one.hold.set()
        assert (await first)[1] == (0, "one")
        assert [await call for call in late] == [([], (7, "one")), None]

    asyncio.run(scenario())
