"""Which trajectories a free teacher takes. `pytest tests/deploy/run/test_scoring.py`"""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayError

from opdlm.actors.pool import ActorPool
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.batches import in_groups
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.run.dealing import Decoded
from opdlm.deploy.run.scoring import Scoring, like_lengths
from tests.fakes import virtual_time
from tests.fakes.actors import Remote


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 400))
def test_a_batch_is_the_oldest_and_those_nearest_to_it_in_length(lengths, most) -> None:
    chosen = like_lengths(lengths, most)
    assert 0 in chosen
    assert len(chosen) == 1 or max(lengths[place] for place in chosen) * len(chosen) <= most
    distance = {place: abs(length - lengths[0]) for place, length in enumerate(lengths)}
    left = distance.keys() - chosen
    assert not left or max(distance[place] for place in chosen) <= min(distance[place] for place in left)


class _Teacher:
    """Takes a second for a hundred tokens, padding included."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.seconds = 0.0

    async def score(self, places, per_reference, watch, *groups):
        trajectories = [groups[group][place] for group, place in places]
        self.batches.append([sum(lengths) - 1 for _, lengths in trajectories])
        seconds = max(self.batches[-1]) * len(places) / 100
        await asyncio.sleep(seconds)
        self.seconds += seconds
        lengths = tuple(lengths for _, lengths in trajectories)
        return (*in_groups(trajectories, per_reference), ScoreStats(1, 1, seconds, 1, lengths))


class _Records:
    def __init__(self) -> None:
        self.progress = RunProgress()

    def scored(self, stats) -> None: ...


def test_several_teachers_share_what_one_actor_decodes_and_each_trajectory_is_scored_once() -> None:
    """Groups of three trajectories, of very different lengths; a batch mixes those of several groups."""

    async def scenario() -> None:
        loop, teachers = asyncio.get_running_loop(), [_Teacher() for _ in range(4)]
        pool = ActorPool({f"teacher-{i}": Remote(t, loop) for i, t in enumerate(teachers)}, 1e6, 0)
        scoring = Scoring(pool, _Records(), per_reference=2, batch_tokens=400, round_size=240)
        lengths, waiting = [(5, 6 + 37 * i % 160) for i in range(240)], []
        for start in range(0, len(lengths), 3):
            group = tuple((start + i, lengths[start + i]) for i in range(3))
            for place, (index, of) in enumerate(group):
                waiting.append(asyncio.ensure_future(scoring.score(Decoded(group, place, index, of, 0))))
            await asyncio.sleep(0.5)
        samples = await asyncio.gather(*waiting)
        for index, sample in enumerate(samples):
            assert (await sample.group)[sample.place] == (index, lengths[index])
            assert (sample.prompt_tokens, sample.response_tokens) == lengths[index]
        assert sorted(n for t in teachers for b in t.batches for n in b) == sorted(sum(of) - 1 for of in lengths)
        assert all(len(b) == 1 or max(b) * len(b) <= 400 for t in teachers for b in t.batches)
        busy = [t.seconds for t in teachers]
        assert min(busy) >= 0.8 * sum(busy) / 4

    virtual_time.run(scenario())


def test_a_batch_is_of_one_round_the_oldest_first() -> None:
    """Rounds of four. The last sample of round 1 comes late, and the learner waits for it, not for those of round 2."""

    async def scenario() -> None:
        teacher = _Teacher()
        pool = ActorPool({"teacher-0": Remote(teacher, asyncio.get_running_loop())}, 1e6, 0)
        scoring = Scoring(pool, _Records(), per_reference=2, batch_tokens=1000, round_size=4)
        ends: list[int] = []

        async def score(index: int) -> None:
            await scoring.score(Decoded(((index, (5, 6)),), 0, index, (5, 6), 0))
            ends.append(index)

        await asyncio.gather(*(score(index) for index in (4, 8, 9, 5, 6, 10, 7)))
        assert [len(batch) for batch in teacher.batches] == [4, 3]
        assert ends[:4] == [4, 5, 6, 7]

    virtual_time.run(scenario())


def test_a_trajectory_that_comes_in_the_turn_of_the_last_answer_is_scored() -> None:
    class Teachers:
        serving = 1

        def __init__(self) -> None:
            self.answers: list[asyncio.Future[None]] = []

        async def call_late(self, method, arguments):
            (places, *_), _ = arguments()
            self.answers.append(asyncio.get_running_loop().create_future())
            await self.answers[-1]
            return ["sample"] * len(places), ScoreStats(1, 1, 0.1, 1, ((1, 1),) * len(places))

    async def scenario() -> None:
        teachers, decoded = Teachers(), asyncio.get_running_loop().create_future()
        scoring = Scoring(teachers, _Records(), per_reference=1, batch_tokens=100, round_size=4)

        async def sample() -> None:
            await decoded
            await scoring.score(Decoded("group", 1, 1, (1, 1), 0))

        waiting = asyncio.gather(scoring.score(Decoded("group", 0, 0, (1, 1), 0)), sample())
        await asyncio.sleep(0.01)
        teachers.answers[0].set_result(None)
        decoded.set_result(None)
        await asyncio.sleep(0.01)
        teachers.answers[1].set_result(None)
        await waiting

    asyncio.run(scenario())


def test_only_the_trajectories_that_are_lost_fail_and_those_of_other_groups_are_scored() -> None:
    class Teacher(_Teacher):
        async def score(self, places, per_reference, watch, *groups):
            if "lost" in groups:
                raise RayError("the object is lost")
            return await super().score(places, per_reference, watch, *groups)

    async def scenario() -> None:
        pool = ActorPool({"teacher-0": Remote(Teacher(), asyncio.get_running_loop())}, 1e6, 0)
        scoring = Scoring(pool, _Records(), per_reference=2, batch_tokens=1000, round_size=8)
        kept = tuple((i, (5, 6)) for i in range(3))
        trajectories = [Decoded(kept, 0, 0, (5, 6), 0), Decoded("lost", 0, 3, (5, 6), 0)]
        trajectories += [Decoded(kept, i, i, (5, 6), 0) for i in (1, 2)]
        samples = await asyncio.gather(*map(scoring.score, trajectories), return_exceptions=True)
        assert [isinstance(sample, RayError) for sample in samples] == [False, True, False, False]

    virtual_time.run(scenario())
