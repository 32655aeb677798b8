"""Everything that a run can report: every kind of record, with something in every counter."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.reward.actor import RewardStats
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import PERIODIC
from opdlm.learner.train_step import StepResult
from tests.deploy.observe.test_records import ROUND, result

ACTORS = {"rollout_actors": 2, "teacher_actors": 1}
LOST = 9.0
"""Loss of a step that is trained again, so that `metrics.jsonl` no longer has it."""


def report_everything(records: RunRecords) -> None:
    """Two rounds of two optimizer steps in all, after everything that can go wrong."""
    state = asyncio.run(_queue_state()) | ACTORS
    records.data(12, ["row 3: too long"], "digest")
    records.given(4, 100, cached=False, cut=1)
    start = {"kind": "learner_start", "round": 0, "step": 0}
    lost = {"kind": "step", "round": 0, "step": 2, "loss": LOST}
    records.learned([start, lost, start], state)  # the first start is no restart, so it makes no record
    place = {"round": 0, "step": 0, "in_a_row": 1, "reason": "why"}
    skipped, unsaved = (
        {"kind": "skipped_step", "steps": 1},
        {"kind": "failed_save", "saves": 1, "checkpoint_seconds": 0.2},
    )
    records.learned([skipped | place, unsaved | place, unsaved | place | {"in_a_row": 2}], state)
    records.actor_died("rollout-1", "killed")
    records.queue_died("killed")
    records.went_back("the checkpoint of round 2 is damaged")
    records.failed([0, 1, 2], 1, "ValueError: no such thing", "RayTaskError(ValueError)")
    step = {"kind": "step", "learning_rate": 1e-3, **asdict(StepResult(1.5, 2.0, 7, 1, 30, 800, 50, 0.2))}
    for round_ in (1, 2):
        records.pushed(WeightHandle(round_ - 1, [], 64), 0.5)
        records.decoded(DecodeStats(0, 4, 80, 40, 12, 300, 2.0, ended_by_eos=3, slot_steps=48, occupied_slot_steps=40))
        records.scored(ScoreStats(80, 90, 0.5, 160, room_tokens=128))
        records.judged(RewardStats((0.5, -1.0), False, ("omitted",), 0.1))
        place = {"round": round_ - 1, "step": round_}
        policy = {
            "ratio": 1.0,
            "clipped_share": 0.1,
            "logprob_change": 0.02,
            "reference_kl": 0.1,
            "advantage_size": 0.8,
        }
        records.learned([step | place | {"forward_kl_nats": 1.5} | policy], state)
        counted = {"staleness_max": 1, "learner_wait_seconds": 0.1, "rollout_tokens": 80 * round_}
        records.learned([ROUND | {"round": round_, "step": round_} | counted], state)
        place = {"round": round_, "step": round_}
        publish = {"kind": "publish", "weight_version": round_, "publish_seconds": 0.1, "nbytes": 64}
        records.learned([publish | place, {"kind": "checkpoint", "checkpoint_seconds": 0.3} | place], state)
        records.evaluated(PERIODIC, round_, result(0.5, 2.0, 60.0))


async def _queue_state() -> dict:
    """State of a real queue that took four samples, one of them twice, refused a stale one, and had one made again."""
    queue = ReplayQueueActor(4, 1, 12, 0)
    await queue.weights_taken(0)
    assert await queue.lease(8) == list(range(8))
    assert await queue.put([0, 1, 2, 3], [0] * 4, list("abcd")) == ["accepted"] * 4
    assert await queue.put([0], [0], ["a"]) == ["duplicate"]
    assert await queue.put([4], [-1], ["e"]) == ["stale"]
    await queue.take_round(0)
    waiting = asyncio.ensure_future(queue.remade_sample(2, "c"))
    assert await queue.lease(8) == [2]
    assert await queue.put([2], [0], ["c"]) == ["accepted"]
    assert await waiting == "c"
    return await queue.state()
