"""Runs that end by themselves: early, or in parts; and their best student. `pytest tests/system/test_early_end.py`"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.model.load import load_model
from opdlm.deploy.observe.report import PERIODIC
from opdlm.deploy.run.train import train
from tests.system.runs import ROUNDS, losses, records_of, run_config

pytestmark = pytest.mark.ray

OFTEN = {"every_rounds": 1, "problems": 4, "max_new_tokens": 9}


def same_weights(folder: Path, checkpoint: Path) -> bool:
    held, saved = load_model(folder).state_dict(), load_file(checkpoint / "weights.safetensors")
    return all(held[name].equal(tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_an_early_stop_is_a_finished_run_which_may_go_on(ray_cluster, chain_teacher, whole, tmp_path) -> None:
    """An untrained teacher's answers are never right, so no evaluation is better than that of round 0.

    That a resumed run stops again at once is in `tests/deploy/evaluate/test_best_during_run.py`.
    """
    run_dir, text = tmp_path / "run", io.StringIO()

    def go(resume: bool, **keep_best) -> int:
        config = run_config(chain_teacher, run_dir, evaluation=OFTEN, checkpoint={"keep_best": keep_best})
        return train(config, resume, Console(file=text, width=200))

    assert go(resume=False, patience=2) == 0
    assert [record["round"] for record in records_of(run_dir, "round")] == [1, 2]
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint.rounds == 2
    assert same_weights(run_dir / "student", checkpoint.folder)
    why = "exact_match was not better than 0 in 2 evaluations in a row (checkpoint.keep_best.patience 2)"
    assert f"training ended early, after round 2 of {ROUNDS}: {why}" in text.getvalue()
    report = json.loads((run_dir / "report.json").read_text())
    assert report["student_exact_match_static"] == 0, "the last evaluations were made"
    assert (report["best"]["round"], report["best"]["folder"]) == (0, str(run_dir / "best" / "round-000000"))
    start, best = (load_model(run_dir / name).state_dict() for name in ("student_init", "best/round-000000"))
    assert all(best[name].equal(tensor) for name, tensor in start.items())

    assert go(resume=True) == 0
    assert losses(run_dir) == losses(whole)
    assert same_weights(run_dir / "student", latest_checkpoint(run_dir / "checkpoints").folder)
    assert [path.name for path in (run_dir / "best").iterdir()] == ["round-000000"]


@pytest.mark.slow
def test_parts_that_end_by_themselves_equal_an_unbroken_run(ray_cluster, chain_teacher, whole, tmp_path) -> None:
    """With evaluations beside the run; the student of the best one is that of its version's checkpoint."""
    run_dir, text = tmp_path / "run", io.StringIO()
    sections = {
        "evaluation": OFTEN | {"actors": 1, "final_problems": 0},
        "checkpoint": {"keep_best": {"figure": "tokens_per_step", "mode": "max"}},
    }

    def go(resume: bool, **run) -> int:
        return train(run_config(chain_teacher, run_dir, run=run, **sections), resume, Console(file=text, width=200))

    assert go(resume=False, max_minutes=1e-4) == 0
    assert latest_checkpoint(run_dir / "checkpoints").rounds == 1
    assert f"0.0001 minutes are over (run.max_minutes): round 1 of {ROUNDS} is finished" in text.getvalue()
    command = f"opdlm train {run_dir}/config.yaml --resume --minutes 0.0001"
    assert f"stopped after round 1 of {ROUNDS}, its 0.0001 minutes are over; go on with: {command}" in text.getvalue()
    assert not (run_dir / "student").exists()

    assert go(resume=True) == 0
    assert losses(run_dir) == losses(whole)
    evaluations = [record for record in records_of(run_dir, "evaluation") if record["row"] == PERIODIC]
    assert [record["round"] for record in evaluations] == list(range(ROUNDS + 1))
    best = max(evaluations, key=lambda record: (record["tokens_per_step"], -record["round"]))
    (folder,) = (run_dir / "best").iterdir()
    assert folder.name == f"round-{best['round']:06d}"
    if best["round"]:
        assert same_weights(folder, run_dir / "checkpoints" / folder.name)
    assert f"best student: round {best['round']}, tokens_per_step" in text.getvalue()
