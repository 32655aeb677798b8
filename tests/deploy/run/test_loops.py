"""The loops of a run with fake actors train every sample once, in order. `pytest tests/deploy/run/test_loops.py`"""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.actors import ROUNDS, FakeRun, N, Rollout, Teacher


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_sample_is_trained_once_in_order_and_never_too_stale(tmp_path, staleness) -> None:
    async def scenario() -> None:
        rollout = Rollout()
        run = FakeRun(tmp_path, staleness, rollout, Teacher())
        await run.run()
        assert [i for indices in run.trained for i in indices] == list(range(N * ROUNDS))
        assert all(0 <= i // N - version <= staleness for i, version in rollout.decoded)
        assert run.pushed[0] == 0
        assert run.pushed == sorted(set(run.pushed))
        assert rollout.version == ROUNDS, "the last weights must reach the rollout actors too"

    asyncio.run(scenario())
