"""The driver deals late, in virtual time, whatever happens to the actors. `pytest tests/deploy/run/test_dealing.py`"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.errors import OpdlmError
from opdlm.common.types import WeightHandle
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.run.dealing import Dealer
from tests.fakes import virtual_time
from tests.fakes.actors import Remote
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages
from tests.fakes.slot_rollout import SlotRollout
from tests.tiny import request

pytestmark = pytest.mark.usefixtures("learner_as_a_coroutine")

_NO_TIME = Stages(0, 0.001, 0.5, 0)


@pytest.fixture(autouse=True, scope="module")
def kills():
    """Actors that are retired are killed without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdlm.actors.members.ray.kill", lambda actor: None)
        yield


def run_of(folder: str, shape: Shape, actors: dict[str, SlotRollout], stages: Stages = _NO_TIME) -> SimulatedRun:
    loop = asyncio.get_running_loop()
    assert loop.time() == 0
    return SimulatedRun(Path(folder), shape, stages, rollouts=lambda: actors)


EVENTS = st.lists(
    st.tuples(
        st.floats(0.1, 60), st.sampled_from(["death", "death", "quick death", "add", "retire"]), st.integers(0, 5)
    ),
    max_size=6,
)


@given(
    n=st.integers(1, 9),
    rounds=st.integers(1, 5),
    staleness=st.integers(0, 2),
    slots=st.integers(1, 4),
    actors=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    speeds=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
    push=st.sampled_from([0.0, 2.0]),
    continues=st.booleans(),
    events=EVENTS,
)
@settings(max_examples=60)
def test_each_sample_is_trained_once_and_none_is_too_stale_whatever_dies_comes_and_goes(
    n, rounds, staleness, slots, actors, lengths, speeds, push, continues, events
) -> None:
    """Nothing starves either."""

    async def scenario(folder: str) -> None:
        def actor(number: int) -> SlotRollout:
            speed = speeds[number % len(speeds)]
            return SlotRollout(slots, lambda i: lengths[i % len(lengths)], speed, push, continues, restarts=10)

        everyone = {f"rollout-{i}": actor(i) for i in range(actors)}
        overrides = (("on_new_weights", "continue" if continues else "finish"),)
        run = run_of(folder, Shape(staleness, rounds, n, actors, 2, overrides), dict(everyone))

        async def disturb() -> None:
            for at, what, which in sorted(events):
                await asyncio.sleep(max(at - asyncio.get_running_loop().time(), 0))
                names = run.rollouts.ready_names
                if what == "add":
                    name = f"rollout-{len(everyone)}"
                    everyone[name] = actor(len(everyone))
                    run.rollouts.add(name, Remote(everyone[name], asyncio.get_running_loop()))
                elif what == "death" and names:
                    everyone[names[which % len(names)]].die()
                elif what == "quick death" and names:
                    everyone[names[which % len(names)]].die_and_come_back()
                elif what == "retire" and len(names) > 1:
                    retiring.append(asyncio.ensure_future(run.rollouts.retire(names[which % len(names)])))

        retiring: list[asyncio.Future[None]] = []
        disturbing = asyncio.ensure_future(disturb())
        await asyncio.wait_for(run.run(), 10_000)  # the queue's heartbeats would go on for ever
        disturbing.cancel()
        await asyncio.gather(*retiring)
        assert run.trained == {r: list(range(r * n, (r + 1) * n)) for r in range(rounds)}
        assert run.queue._queue.refused == {"duplicate": 0, "stale": 0}
        ended = [one for actor in everyone.values() for one in actor.ended]
        assert all(0 <= index // n - version <= staleness for index, version in ended)

    with tempfile.TemporaryDirectory() as folder:
        virtual_time.run(scenario(folder))


def test_a_fast_actor_decodes_more_and_a_slow_one_has_no_backlog(tmp_path) -> None:
    async def scenario() -> None:
        fast, slow = SlotRollout(8, lambda i: 20, 1.0), SlotRollout(8, lambda i: 20, 2.0)
        run = run_of(str(tmp_path), Shape(0, 1, 240, 2), {"rollout-0": fast, "rollout-1": slow})
        await run.run()
        assert len(fast.ended) + len(slow.ended) == 240
        ideal = 240 * 20 / (8 / 1.0 + 8 / 2.0)
        assert max(fast.steps[-1][0], slow.steps[-1][0]) <= 1.1 * ideal

    virtual_time.run(scenario())


def test_slots_are_full_until_the_last_request_is_dealt(tmp_path) -> None:
    async def scenario() -> None:
        actor = SlotRollout(32, lambda i: 1 + 97 * i % 150)
        run = run_of(str(tmp_path), Shape(0, 1, 256), {"rollout-0": actor})
        await run.run()
        last = max(actor.began.values())
        occupied = sum(occupied for at, occupied in actor.steps if at <= last)
        assert occupied >= 0.95 * 32 * last

    virtual_time.run(scenario())


def test_with_staleness_slots_take_the_next_round_at_once(tmp_path) -> None:
    """One long sequence a round: strictly on-policy the other slots idle; at staleness 1 they decode the next round."""

    async def seconds(staleness: int) -> float:
        actor = SlotRollout(8, lambda i: 100 if i % 8 == 0 else 10, continues=True)
        shape = Shape(staleness, 12, 8, overrides=(("on_new_weights", "continue"),))
        with tempfile.TemporaryDirectory() as folder:
            run = SimulatedRun(Path(folder), shape, _NO_TIME, rollouts=lambda: {"rollout-0": actor})
            await run.run()
        return run.seconds_per_round()

    assert virtual_time.run(seconds(1)) <= 0.6 * virtual_time.run(seconds(0))


def test_when_no_actor_is_left_the_run_ends_with_its_name(tmp_path) -> None:
    async def scenario() -> None:
        actor = SlotRollout(2, lambda i: 10)
        run = run_of(str(tmp_path), Shape(0, 1, 8), {"rollout-0": actor})
        running = asyncio.ensure_future(run.run())
        await asyncio.sleep(15)
        actor.die()
        with pytest.raises(OpdlmError, match=r"rollout-0: died more often than resources\.actor_restarts 0 allows"):
            await running

    virtual_time.run(scenario())


def test_what_nobody_awaits_any_more_is_not_decoded_to_its_end() -> None:
    """As after a stop: the last weights, or an evaluation, need not wait for it."""

    async def scenario() -> None:
        actor = SlotRollout(4, lambda i: 1000)
        dealer = dealer_of(actor)
        weights = WeightHandle(0, [], 0)
        awaited = [asyncio.ensure_future(dealer.decode(request(3, i), weights)) for i in range(7)]
        await asyncio.sleep(10)
        assert (len(actor.live), len(actor.inbox)) == (4, 1)
        for one in awaited:
            one.cancel()
        await asyncio.sleep(1)
        assert (actor.live, len(actor.inbox), await dealer.room()) == ({}, 0, 5)
        actor.length = lambda i: 3
        assert (await dealer.decode(request(3, 7), weights)).index == 7

    virtual_time.run(scenario())


def dealer_of(
    *actors: SlotRollout, seconds: float = 1e6, streamed: Callable[..., None] = lambda name, report: None
) -> Dealer:
    """Deals to actors of 4 slots. `seconds`: longest wait for an answer, or for an actor to be ready."""
    loop = asyncio.get_running_loop()
    pool = ActorPool({f"rollout-{i}": Remote(actor, loop) for i, actor in enumerate(actors)}, seconds, 0)
    return Dealer(pool, SimpleNamespace(progress=RunProgress(), streamed=streamed), DecodeSettings(), 4, 1)


def test_an_actor_that_dies_while_it_has_nothing_to_do_has_no_room() -> None:
    """A push finds it dead, and Ray has no place to restart it."""

    class Stuck(SlotRollout):
        async def ready(self) -> None:
            await asyncio.Event().wait()

    async def scenario() -> None:
        actor, weights = Stuck(4, lambda i: 3), WeightHandle(0, [], 0)
        dealer = dealer_of(actor, seconds=100)
        await dealer.decode(request(3, 0), weights)
        actor.die()
        await dealer._actors.broadcast("load_weights", WeightHandle(1, [], 0))
        for awaited in (dealer.room(), dealer.decode(request(3, 1), weights)):
            with pytest.raises(OpdlmError, match="rollout-0: none was ready within 100 s"):
                await awaited

    virtual_time.run(scenario())


def test_an_actor_that_died_and_came_back_while_nobody_called_it_gets_a_new_stream() -> None:
    """As after a node's death, while the run waits for its learner."""

    async def scenario() -> None:
        actor, weights = SlotRollout(4, lambda i: 3, restarts=1), WeightHandle(0, [], 0)
        dealer, deaths = dealer_of(actor), []
        dealer._actors.on_death = lambda name, reason: deaths.append((name, reason))
        await dealer.decode(request(3, 0), weights)
        actor.die_and_come_back()
        both = await asyncio.gather(*(dealer.decode(request(3, i), weights) for i in (1, 2)))
        assert [one.index for one in both] == [1, 2]
        assert deaths == [("rollout-0", "the actor was restarted")]

    virtual_time.run(scenario())


def test_whatever_goes_wrong_in_the_driver_nobody_waits_for_ever() -> None:
    def full(name: str, report: object) -> None:
        raise OSError(28, "No space left on device")

    async def scenario() -> None:
        dealer, weights = dealer_of(SlotRollout(2, lambda i: 3 + 10 * i), streamed=full), WeightHandle(0, [], 0)
        both = await asyncio.gather(*(dealer.decode(request(3, i), weights) for i in range(2)), return_exceptions=True)
        assert any(isinstance(answer, OSError) for answer in both)
        with pytest.raises(OSError, match="No space left"):
            await dealer.decode(request(3, 2), weights)

    virtual_time.run(scenario())


def test_an_actor_that_must_end_its_sequences_before_it_begins_others_gets_none() -> None:
    """`finish`: the new weights wait for one long sequence; the other actor decodes the whole next round meanwhile."""

    async def scenario() -> None:
        dealer = dealer_of(SlotRollout(4, lambda i: 1000 if i == 0 else 10), SlotRollout(4, lambda i: 10))
        first = [asyncio.ensure_future(dealer.decode(request(3, i), WeightHandle(0, [], 0))) for i in range(6)]
        await asyncio.sleep(5)
        new = WeightHandle(1, [], 0)
        pushing = asyncio.ensure_future(dealer._actors.broadcast("load_weights", new))
        await asyncio.wait(first[1:])
        second = [asyncio.ensure_future(dealer.decode(request(3, i), new)) for i in range(6, 14)]
        await asyncio.sleep(100)
        assert [one.done() for one in second] == [True] * 8
        await asyncio.gather(first[0], pushing)

    virtual_time.run(scenario())
