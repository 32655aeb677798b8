"""Evaluations beside a run, with fakes. `pytest tests/deploy/evaluate/test_background.py`"""

from __future__ import annotations

import asyncio

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.errors import ConfigError, OpdlmError, WeightsLost
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.placement import demands
from opdlm.deploy.evaluate.background import MOST_WAITING, BackgroundEvaluations
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.report import PERIODIC
from opdlm.learner.schedule import TrainingSchedule
from tests.fakes.actors import ROUNDS, FakeRun, N, Rollout, Teacher
from tests.patience import PATIENCE

BASE = {"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 10}}


def handle(version: int) -> WeightHandle:
    return WeightHandle(version, [], 0)


def never(given: WeightHandle, error: WeightsLost) -> None:
    raise AssertionError(f"version {given.version} is not lost") from error


class Evaluator:
    """Ends an evaluation when `may_end` is released; records what began and ended, and the most that ran at once."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.most_together = 0
        self.may_end = asyncio.Semaphore(0)
        self.fail_at = fail_at

    async def __call__(self, given: WeightHandle) -> None:
        self.begun.append(given.version)
        self.most_together = max(self.most_together, len(self.begun) - len(self.ended))
        await self.may_end.acquire()
        self.ended.append(given.version)
        if given.version == self.fail_at:
            raise RuntimeError(f"evaluation of version {given.version} broke")


async def _let_others_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_evaluations_run_one_at_a_time_in_order_and_a_full_queue_makes_the_next_wait() -> None:
    async def scenario() -> None:
        evaluator = Evaluator()
        spare = BackgroundEvaluations(evaluator, never)
        for version in range(MOST_WAITING + 1):
            await asyncio.wait_for(spare.submit(handle(version)), timeout=PATIENCE)  # none of these waits
        last = asyncio.create_task(spare.submit(handle(99)))
        await _let_others_run()
        assert evaluator.begun == [0]
        assert not last.done()
        evaluator.may_end.release()
        await asyncio.wait_for(last, timeout=PATIENCE)
        for _ in range(MOST_WAITING + 1):
            evaluator.may_end.release()
        await asyncio.wait_for(spare.finish(), timeout=PATIENCE)
        assert evaluator.ended == [*range(MOST_WAITING + 1), 99]
        assert evaluator.most_together == 1

    asyncio.run(scenario())


def test_a_version_whose_weights_are_lost_is_a_gap_and_the_next_one_is_evaluated() -> None:
    async def scenario() -> None:
        evaluated, gaps = [], []

        async def evaluate(given: WeightHandle) -> None:
            if given.version == 1:
                raise WeightsLost("weights of version 1: the owner has exited")
            evaluated.append(given.version)

        spare = BackgroundEvaluations(evaluate, lambda given, error: gaps.append((given.version, str(error))))
        for version in range(3):
            await spare.submit(handle(version))
        await spare.finish()
        assert evaluated == [0, 2]
        assert gaps == [(1, "weights of version 1: the owner has exited")]

    asyncio.run(scenario())


def test_a_failure_ends_the_run_and_no_later_evaluation_starts() -> None:
    async def scenario() -> None:
        evaluator = Evaluator(fail_at=0)
        spare = BackgroundEvaluations(evaluator, never)
        await spare.submit(handle(0))
        await spare.submit(handle(1))
        evaluator.may_end.release()
        await _let_others_run()
        with pytest.raises(OpdlmError, match="version 0 broke"):
            await spare.submit(handle(2))
        with pytest.raises(OpdlmError, match="version 0 broke"):
            await spare.finish()
        assert evaluator.begun == [0]

    asyncio.run(scenario())


def test_the_run_goes_on_to_its_end_during_the_first_evaluation(tmp_path) -> None:
    """With the real loops and queue, all rounds are trained before the first evaluation may end."""

    async def scenario() -> None:
        run = FakeRun(tmp_path, 0, Rollout(), Teacher())
        evaluator = Evaluator()
        schedule = TrainingSchedule(N * ROUNDS, N, 2, 0)

        async def evaluate(given: WeightHandle) -> None:
            await evaluator(given)
            assert given.pack, "the weights must be held until the evaluation is done"
            result = EvaluationResult(**dict.fromkeys(EvaluationResult.__slots__, 0.5) | {"by_task": {}})
            records.evaluated(PERIODIC, given.version, result, schedule.steps_before(given.version))

        spare, records = BackgroundEvaluations(evaluate, never), run.records

        async def on_weights(given: WeightHandle) -> None:
            if given.version % 2 == 0:  # 0, 2, 4
                await spare.submit(given)

        run.loops.on_weights = on_weights
        await run.run()
        assert [i for indices in run.trained for i in indices] == list(range(N * ROUNDS))
        assert evaluator.ended == []
        for _ in range(3):
            evaluator.may_end.release()
        await asyncio.wait_for(spare.finish(), timeout=PATIENCE)
        written = [r for r in read_records(tmp_path) if r["kind"] == "evaluation"]
        assert [(r["round"], r["step"]) for r in written] == [(0, 0), (2, 4), (4, 8)]

    asyncio.run(scenario())


def test_spare_actors_get_the_resources_of_rollout_actors() -> None:
    sizes = {"rollout": {"cpus_per_actor": 2, "gpus_per_actor": 0.5}}
    config = config_from_dict(BASE | sizes | {"evaluation": {"every_rounds": 5, "actors": 3}})
    assert ("evaluation", 3, 2) in demands(config)["CPU"]
    assert ("evaluation", 3, 0.5) in demands(config)["GPU"]
    assert ("evaluation", 0, 0) in demands(config_from_dict(BASE))["GPU"]
    with pytest.raises(ConfigError, match=r"evaluation\.actors: found 3 without evaluation\.every_rounds"):
        config_from_dict(BASE | {"evaluation": {"actors": 3}})
