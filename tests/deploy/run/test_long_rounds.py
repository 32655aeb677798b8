"""A round that takes minutes is seen to move. `pytest tests/deploy/run/test_long_rounds.py`"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opdlm.deploy.observe.progress import DECODED, SCORED, ProgressWatch
from opdlm.deploy.observe.terminal import progress_lines
from opdlm.learner.schedule import TrainingSchedule
from tests.deploy.observe.test_progress import stages
from tests.fakes import virtual_time
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages

pytestmark = pytest.mark.usefixtures("learner_as_a_coroutine")


def test_a_round_of_minutes_is_seen_to_move(tmp_path) -> None:
    """The real loops and queue in virtual time: eight samples of 15 s each, which leave as they are decoded."""
    seen: list[tuple[float, dict[str, Any]]] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        run = SimulatedRun(tmp_path, Shape(0, 2, prompts_per_round=8), Stages(120, 40, 10, 1))
        run.records._view.show = lambda record: seen.append((loop.time(), record))  # type: ignore[method-assign]
        watch = ProgressWatch(run.loops.roles, TrainingSchedule(16, 8, 8, 0), run.records)
        assert progress_lines(run.records.progress.figures({}, 0.0)) == ["round 1/2: the learner starts"]
        run.records.learned([{"kind": "learner_start", "round": 0, "step": 0}], {})
        watching = asyncio.create_task(watch.watch())
        await run.run()
        watching.cancel()

    virtual_time.run(scenario())
    of_round = [(at, stages(record), record) for at, record in seen if record["kind"] == "progress"]
    decoded = {at: counts[DECODED][0] for at, counts, _ in of_round if DECODED in counts and at <= 122}
    assert decoded[32.0] == 2
    assert sorted(decoded.values()) == list(decoded.values())
    assert set(decoded.values()) == set(range(9))
    _, _, middle = next(entry for entry in of_round if entry[0] == 92.0)
    assert middle["stages"][0]["per_second"] > 0
    assert middle["stages"][0]["tokens_per_second"] > 0
    assert any(counts.get(SCORED) == (8, 8, 0) for _, counts, _ in of_round)
