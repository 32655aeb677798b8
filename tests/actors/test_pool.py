"""Actors that die, come back, are added and are retired, without Ray. `pytest tests/actors/test_pool.py`"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from opdlm.actors.members import DEATHS
from opdlm.actors.pool import ActorPool
from opdlm.common.errors import OpdlmError
from tests.fakes import virtual_time
from tests.patience import PATIENCE


class FakeActor:
    """A fake actor handle. `work(x)` returns `(x, name)`; a dead actor is alive again after `away` calls of `ready`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive, self.gone, self.away = True, False, 3
        self.at_work = self.most_at_work = 0
        self.hold: asyncio.Event | None = None

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self, f"do_{method}"))

    def die(self, for_good: bool = False, says: type[RayError] = RayActorError) -> None:
        self.alive, self.gone, self.says = False, for_good, says
        if self.hold:
            self.hold.set()

    async def do_ready(self) -> None:
        self.away -= 1
        if self.away == 0 and not self.gone:
            self.alive = True
        self._check()

    async def do_work(self, x: int) -> tuple[int, str]:
        self._check()
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        if self.hold:
            await self.hold.wait()
        await asyncio.sleep(0)
        self.at_work -= 1
        self._check()
        return x, self.name

    def _check(self) -> None:
        if self.gone:
            raise self.says("it is dead")
        if not self.alive:
            raise ActorUnavailableError("restarting", b"0" * 16)


class _Method:
    def __init__(self, function: Callable[..., Awaitable[object]]) -> None:
        self._function = function

    def options(self, num_returns: int) -> _Method:
        return self

    def remote(self, *arguments: object) -> asyncio.Future:
        return asyncio.ensure_future(self._function(*arguments))


@pytest.fixture(autouse=True)
def killed(monkeypatch) -> list[FakeActor]:
    """The actors that the pool killed."""
    killed: list[FakeActor] = []
    monkeypatch.setattr("opdlm.actors.members.ray.kill", killed.append)
    monkeypatch.setattr("opdlm.actors.members._LONGEST_PAUSE_SECONDS", 0.001)
    return killed


def pool_of(*actors: FakeActor, timeout: float = 30) -> tuple[ActorPool, list[str]]:
    """A pool, and the list of the names that it reports as dead."""
    pool, deaths = ActorPool({a.name: a for a in actors}, timeout, 2), []
    pool.on_death = lambda name, reason: deaths.append(name)
    return pool, deaths


async def work(pool: ActorPool, count: int) -> list[tuple[int, str]]:
    return [small for _, small in await asyncio.gather(*(pool.call("work", x) for x in range(count)))]


def test_a_call_that_dies_goes_to_another_actor_and_the_dead_one_comes_back() -> None:
    async def scenario() -> None:
        one, two = FakeActor("one"), FakeActor("two")
        pool, deaths = pool_of(one, two)
        one.hold = asyncio.Event()
        answers = asyncio.create_task(work(pool, 6))
        while not one.at_work:
            await asyncio.sleep(0)
        one.die()
        assert [x for x, _ in await answers] == list(range(6)), "nothing is lost"
        assert {who for _, who in await answers} == {"two"}
        assert deaths == ["one"]
        one.hold = None
        while pool._starting:
            await asyncio.sleep(0.001)
        assert {who for _, who in await work(pool, 4)} == {"one", "two"}
        assert (one.most_at_work, two.most_at_work) == (1, 1), "one call at a time"

    asyncio.run(scenario())


def test_a_broadcast_does_not_wait_for_an_actor_that_restarts() -> None:
    async def scenario() -> None:
        one, two = FakeActor("one"), FakeActor("two")
        one.away = 10**9  # a node that does not come back
        pool, deaths = pool_of(one, two)
        one.die()
        await pool.broadcast("work", 0)  # finds the actor dead
        await asyncio.wait_for(pool.broadcast("work", 0), timeout=PATIENCE)
        assert deaths == ["one"], "a death is reported once"
        assert await work(pool, 2) == [(0, "two"), (1, "two")]

    asyncio.run(scenario())


def test_an_idle_actor_that_died_and_came_back_is_queued_once() -> None:
    async def scenario() -> None:
        one = FakeActor("one")
        pool, _ = pool_of(one)
        one.die()
        await pool.broadcast("work", 0)
        while pool._starting:
            await asyncio.sleep(0.001)
        await work(pool, 5)
        assert one.most_at_work == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("says", DEATHS)
def test_every_error_by_which_ray_reports_a_death_counts_as_one(says) -> None:
    async def scenario() -> None:
        one, two = FakeActor("one"), FakeActor("two")
        pool, deaths = pool_of(one, two)
        one.die(for_good=True, says=says)
        assert {who for _, who in await work(pool, 4)} == {"two"}
        while pool._starting:
            await asyncio.sleep(0.001)
        assert (list(pool.actors), deaths) == (["two"], ["one"])
        one, two = FakeActor("one"), FakeActor("two")
        pool, deaths = pool_of(one, two)
        one.die(for_good=True, says=says)
        await pool.broadcast("work", 0)
        assert deaths == ["one"], "a broadcast finds it dead too, and does not fail"

    asyncio.run(scenario())


def test_a_living_actor_that_reports_anothers_death_stays() -> None:
    async def scenario() -> None:
        one = FakeActor("one")
        pool, deaths = pool_of(one)
        error = RayTaskError("work", "", ActorDiedError()).as_instanceof_cause()
        one._check = lambda: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
        for call in (pool.call, pool.broadcast):
            with pytest.raises(RayActorError):
                await call("work", 0)
        assert (list(pool.actors), deaths, pool.serving) == (["one"], [], 1)

    asyncio.run(scenario())


def test_the_last_actor_gone_for_good_ends_every_waiting_call() -> None:
    async def scenario() -> None:
        one = FakeActor("one")
        pool, _ = pool_of(one)
        one.die(for_good=True)
        results = await asyncio.wait_for(
            asyncio.gather(*(pool.call("work", x) for x in range(3)), return_exceptions=True), 10
        )
        assert all(isinstance(r, OpdlmError) and "resources.actor_restarts 2" in str(r) for r in results), results

    asyncio.run(scenario())


def test_it_is_an_error_if_no_actor_is_ready_in_time() -> None:
    async def scenario() -> None:
        one = FakeActor("one")
        one.away = 10**9
        pool, _ = pool_of(one, timeout=20)
        one.die()
        with pytest.raises(OpdlmError, match=r"one: none was ready within 20 s .resources.call_timeout_seconds."):
            await pool.call("work", 0)

    virtual_time.run(scenario())


def test_added_actors_serve_once_ready_and_retired_ones_finish_their_call(killed) -> None:
    async def scenario() -> None:
        one, two = FakeActor("one"), FakeActor("two")
        pool, deaths = pool_of(one)
        two.alive = False
        pool.add("two", two)
        assert {who for _, who in await work(pool, 2)} == {"one"}
        while pool._starting:
            await asyncio.sleep(0.001)
        assert {who for _, who in await work(pool, 2)} == {"one", "two"}
        one.hold = asyncio.Event()
        answers = asyncio.create_task(work(pool, 3))
        while not one.at_work:
            await asyncio.sleep(0)
        retiring = asyncio.create_task(pool.retire("one"))
        await asyncio.sleep(0.01)
        assert not retiring.done(), "it is in a call"
        assert killed == []
        one.hold.set()
        await retiring
        assert killed == [one]
        assert sorted(x for x, _ in await answers) == [0, 1, 2]
        assert {who for _, who in await work(pool, 3)} == {"two"}
        assert deaths == [], "to be retired is no death"

    asyncio.run(scenario())


def test_an_actor_that_cannot_begin_says_why() -> None:
    """Ray does not restart an actor whose constructor raised, and its error quotes the whole traceback."""
    actor = FakeActor("rollout-0")
    text = "Traceback (most recent call last):\nopdlm.common.errors.OpdlmError: rollout.gpus_per_actor: found 1, but"
    failed = ActorDiedError(RayTaskError("RolloutActor.__init__", text, OpdlmError("x"), pid=1, ip="here"))
    actor.die(for_good=True, says=lambda _: failed)

    async def run() -> None:
        pool, _ = pool_of(actor)
        with pytest.raises(OpdlmError, match=r"^rollout-0: rollout\.gpus_per_actor: found 1, but$"):
            await pool.call("work", 1)

    asyncio.run(run())


def test_a_death_is_told_once_however_many_calls_were_open(caplog) -> None:
    """The error of a second call may come when the actor is back already; that is no second death."""

    async def scenario() -> tuple[list[str], bool]:
        actor = FakeActor("a")
        actor.hold, late = asyncio.Event(), asyncio.Event()

        async def push() -> None:
            await late.wait()
            raise ActorDiedError

        actor.do_push = push  # type: ignore[attr-defined]
        pool = ActorPool({"a": actor}, timeout_seconds=30, restarts=1)
        deaths: list[str] = []
        pool.on_death = lambda name, reason: deaths.append(name)
        calls = asyncio.create_task(pool.call("work", 1)), asyncio.create_task(pool.broadcast("push"))
        await asyncio.sleep(0.01)
        actor.die()
        actor.hold = None
        (_, answer) = await calls[0]  # made again by the actor that is back
        late.set()
        await calls[1]
        return deaths, answer == (1, "a") and pool.serving == 1

    assert asyncio.run(scenario()) == (["a"], True)
    assert caplog.text == "", "who listens tells it; the pool does not tell it a second time"


def test_without_a_listener_a_death_is_logged(caplog) -> None:
    async def scenario() -> None:
        pool = ActorPool({name: FakeActor(name) for name in "ab"}, timeout_seconds=30, restarts=1)
        pool.actors["a"].die(for_good=True)
        assert (await pool.call("work", 1))[1] == (1, "b")

    asyncio.run(scenario())
    assert caplog.text.count("a died: ") == 1
