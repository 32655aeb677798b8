"""Keeping the best student and early stop during a run, with fake actors.

`pytest tests/deploy/evaluate/test_best_during_run.py`
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from opdlm.actors.pool import ActorPool
from opdlm.common.config import config_from_dict
from opdlm.common.grid import BlockGrid
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.evaluate.during_run import RunEvaluations
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.report import write_report
from opdlm.learner.schedule import TrainingSchedule
from tests.fakes.actors import Remote


class Student:
    """An actor whose answers to an evaluation of version v are right in `scores[v]` of the problems."""

    def __init__(self, scores: dict[int, int], gate: asyncio.Semaphore | None) -> None:
        self.scores, self.gate = scores, gate
        self.answers: list[Any] = []
        self.saved: list[int] = []

    async def decode(self, requests, handle, *_: Any):
        if self.gate is not None:
            await self.gate.acquire()
        right = self.scores[handle.version]
        made = [SimpleNamespace(response=self.answers[i][i < right], denoising_steps=1) for i in range(len(requests))]
        stats = DecodeStats(handle.version, len(made), 9, 9, 9, 9, 1.0)
        return made, stats

    async def save_student(self, handle, destination: Path, grid: BlockGrid, order: str) -> None:
        assert (grid, order) == (BlockGrid(4, "absolute"), "confidence")
        destination.mkdir(parents=True)
        (destination / "version").write_text(str(handle.version))
        self.saved.append(handle.version)


PROBLEMS, LAST = 4, 7


def evaluations(root: Path, teacher: Path, scores: list[int], beside: bool, console: list[str], patience: int | None):
    """A run's evaluations of each version, by fake actors. Returns them, their actor, and the records."""
    settings = {
        "model": {"teacher": str(teacher)},
        "data": {"task": "chain", "prompts": 9},
        "run": {"dir": str(root)},
        "evaluation": {"every_rounds": 1, "problems": PROBLEMS, "final_problems": 0, "actors": int(beside)},
        "checkpoint": {"keep_best": {"patience": patience}},
    }
    config, tokenizer = config_from_dict(settings), load_tokenizer(str(teacher))
    eos = tokenizer.eos_token_id
    facts = SimpleNamespace(eos_ids=(eos,), tokens=None)
    schedule = TrainingSchedule(LAST * 8, 8, 8, 0)
    checked = SimpleNamespace(config=config, tokenizer=tokenizer, teacher=facts, student=facts, schedule=schedule)
    checked.questions = checked.form = None
    actor = Student(dict(enumerate(scores)), asyncio.Semaphore(0) if beside else None)
    pool = ActorPool({"eval-0": Remote(actor, asyncio.get_running_loop())}, 600, 0)
    roles = SimpleNamespace(rollouts=pool, evaluators=pool if beside else None, teachers=None)
    records = RunRecords(root, SimpleNamespace(show=lambda record: console.append(str(record.get("reason", "")))))
    run = RunEvaluations(checked, roles, records)
    for _, problem in run._periodic._problems.problems:
        right = [*tokenizer(problem.solution, add_special_tokens=False)["input_ids"], eos]
        actor.answers.append((np.array([eos]), np.array(right)))
    return run, actor, records


def test_the_weights_of_the_version_that_was_best_are_kept_though_its_figure_comes_later(
    tmp_path, chain_teacher
) -> None:
    """Beside the run: all versions are published before the first evaluation ends."""

    async def scenario() -> None:
        run, actor, records = evaluations(tmp_path, chain_teacher, [0, 3, 1], True, [], None)
        run.begin(never_asked)
        for version in range(3):
            await run.on_weights(WeightHandle(version, [f"pack {version}"], 0))
        assert actor.saved == []
        for _ in range(3):
            actor.gate.release()
        await run.finish()
        await run.final()
        records.close()
        assert actor.saved == [0, 1]

    asyncio.run(scenario())
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["round-000001"]
    assert (tmp_path / "best/round-000001/version").read_text() == "1"
    write_report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["best"]["round"], report["best"]["figure"], report["best"]["value"]) == (1, "exact_match", 0.75)
    marks = [record.get("best_by") for record in read_records(tmp_path)]
    assert marks == ["max exact_match", "max exact_match", None]


async def never_asked() -> bool:
    raise AssertionError("training must not end early")


def test_training_ends_early_once_and_a_resumed_run_ends_again(tmp_path, chain_teacher) -> None:
    asked: list[int] = []

    async def end_early() -> bool:
        asked.append(1)
        return True

    async def scenario(first: int, last: int) -> str | None:
        run, _, records = evaluations(tmp_path, chain_teacher, [1, 2, 2, 1, 4, 4, 4, 4], False, told, 2)
        run.begin(end_early)
        for version in range(first, last):
            await run.on_weights(WeightHandle(version, ["pack"], 0))
        await run.finish()
        records.close()
        return run.early_stop

    told: list[str] = []
    assert asyncio.run(scenario(0, 3)) is None
    assert asked == []
    why = asyncio.run(scenario(2, 4))  # a resumed run: version 2 is published again, and was evaluated
    assert "exact_match was not better than 0.5 in 2 evaluations in a row" in why
    assert len(asked) == 1
    assert why in told
    assert asyncio.run(scenario(3, 4)) == why
    assert len(asked) == 2
    assert [r["round"] for r in read_records(tmp_path) if r["kind"] == "evaluation"] == [0, 1, 2, 3]


def test_the_last_version_ends_nothing_early(tmp_path, chain_teacher) -> None:
    async def scenario() -> None:
        run, _, records = evaluations(tmp_path, chain_teacher, [1, 2, 3, 4, 4, 4, 4, 4], False, [], 4)
        run.begin(never_asked)
        for version in range(LAST + 1):
            await run.on_weights(WeightHandle(version, ["pack"], 0))
        await run.finish()
        records.close()
        assert run.early_stop is None

    asyncio.run(scenario())
