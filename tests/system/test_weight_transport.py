"""Rollout actors that read weights from the learner (`rollout.weight_transport: nixl`), through real Ray and UCX.

Here from CPU to CPU; on GPUs the same code reads from GPU to GPU. `pytest tests/system/test_weight_transport.py`
"""

from __future__ import annotations

import pytest

from tests.patience import PATIENCE
from tests.system.runs import (
    assert_sound,
    let_go,
    losses,
    records_of,
    run_config,
    running,
    wait_for_rounds,
    wait_until_still,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("nixl", reason="needs the extra opdlm-ray[nixl]")


def test_losses_are_the_same_also_when_the_rank_that_holds_the_weights_dies(
    chain_teacher, whole, victims, tmp_path
) -> None:
    """The restarted rollout actor finds no weights, so it waits until the restarted learner publishes them again."""
    run_dir = tmp_path / "run"
    config = run_config(chain_teacher, run_dir, rollout={"weight_transport": "nixl"}, checkpoint={"every_rounds": 2})
    with running(config, held_after=3) as process:
        wait_for_rounds(run_dir, 3, process)
        rollout = victims.find("rollout")
        rollout.suspend()
        let_go(run_dir)
        wait_until_still(run_dir)  # the actor is in the middle of decoding
        victims.kill("learner")
        rollout.kill()
        assert process.wait(timeout=PATIENCE) == 0
    kinds = assert_sound(run_dir)
    assert kinds["learner_restart"] == 1
    assert [r["role"] for r in records_of(run_dir, "actor_death")] == ["rollout"]
    assert any("WeightsLost" in r["error"] for r in records_of(run_dir, "failure"))
    assert losses(run_dir) == losses(whole)
