"""The newest checkpoint is damaged, in a run and between two. `pytest tests/system/test_damaged_checkpoint.py`"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdlm.common.checkpoint import list_checkpoints
from opdlm.deploy.run.train import train
from tests.system.runs import ROUNDS, assert_sound, losses, run_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUIET = Console(quiet=True)


def damage_newest(run_dir: Path) -> None:
    weights = list_checkpoints(run_dir / "checkpoints")[-1] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def test_a_learner_that_dies_goes_back_to_the_checkpoint_before_it(
    ray_cluster, chain_teacher, whole, victims, tmp_path, monkeypatch
) -> None:
    """The queue has let go of the samples since then: they are made again, the same ones."""
    run_dir = tmp_path / "run"
    left = [4]

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "checkpoint" and record["round"] in left:
            left.remove(record["round"])
            damage_newest(run_dir)
            victims.kill("learner")

    view = type("View", (), {"show": lambda self, record: show(record)})
    monkeypatch.setattr("opdlm.deploy.run.train.open_view", lambda *_: contextlib.nullcontext(view()))
    config = run_config(chain_teacher, run_dir, checkpoint={"every_rounds": 2})
    assert train(config, resume=False, console=QUIET) == 0
    assert not left
    assert assert_sound(run_dir)["damaged_checkpoint"] == 1
    assert losses(run_dir) == losses(whole)
    ours, theirs = ((root / "student" / "model.safetensors").read_bytes() for root in (run_dir, whole))
    assert ours == theirs


def test_a_resume_goes_on_from_the_one_before_it(ray_cluster, chain_teacher, whole, tmp_path, caplog) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("ray_train", "student", "report*"))
    damage_newest(run_dir)
    assert train(run_config(chain_teacher, run_dir), resume=True, console=QUIET) == 0
    assert f"round-{ROUNDS:06d} is damaged" in caplog.text
    assert losses(run_dir) == losses(whole)
