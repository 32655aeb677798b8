"""`opdlm curves`. `pytest tests/deploy/observe/test_curves.py`"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe import report
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.writers import numbers
from tests.deploy.cli.test_cli import opdlm
from tests.deploy.observe.test_records import Listener

RESULT = EvaluationResult(
    problems=10,
    exact_match=0.4,
    tokens_per_step=1.5,
    tokens_per_second=9.0,
    by_task={},
    data_right=0.4,
    by_kind={"capital cities": {"right": 0.4, "questions": 10, "teacher_right": 0.8}},
    of_teacher=0.5,
    agreement=0.1,
    token_agreement=0.3,
    length_ratio=1.2,
    held_out_kl=0.75,
)


def write_run(folder: Path, tokens: list[int], last: float) -> Path:
    folder.mkdir()
    records = RunRecords(folder, Listener())
    records.evaluated(report.TEACHER, 0, replace(RESULT, of_teacher=None, held_out_kl=None, data_right=0.8))
    records.evaluated(report.BEFORE, 0, replace(RESULT, of_teacher=0.0))
    records.evaluated(report.PERIODIC, 0, replace(RESULT, of_teacher=0.1))
    for round_, total in enumerate(tokens, start=1):
        figures = {"kind": "round", "round": round_, "step": round_, "rollout_tokens": total, "wall_seconds": 1.0}
        records._write(figures)
        records.evaluated(report.PERIODIC, round_, replace(RESULT, of_teacher=0.1 * round_), round_)
    records.evaluated(report.STATIC, len(tokens), replace(RESULT, of_teacher=1.1))
    records.evaluated(report.DYNAMIC, len(tokens), replace(RESULT, of_teacher=last))
    records.close()
    return folder


def test_curves_of_several_runs(tmp_path) -> None:
    runs = [write_run(tmp_path / "opd", [100, 250], 0.9), write_run(tmp_path / "cft", [120, 260, 400], 0.7)]
    text = opdlm("curves", *runs, "--out", tmp_path / "c.png", "--score-mark", 0.95)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "opd 250 110.0% 90.0% 1.50 0.750" in text
    written = json.loads((tmp_path / "c.json").read_text())
    opd, cft = written["runs"]
    assert [(p["response_tokens"], p["of_teacher"]) for p in opd["dynamic"]] == [(0, 0.1), (100, 0.1), (250, 0.9)]
    assert [p["response_tokens"] for p in cft["dynamic"]] == [0, 120, 260, 400]
    assert cft["static"]["of_teacher"] == 1.1
    assert written["marks"] == {"of_teacher": 0.95}


def test_kinds_are_series_of_their_own(tmp_path) -> None:
    run = write_run(tmp_path / "opd", [100], 0.9)
    evaluation = next(r for r in read_records(run) if r.get("row") == report.PERIODIC)
    shown = dict(numbers(evaluation))
    assert shown["right_capital_cities"] == 0.4
    assert shown["held_out_kl"] == 0.75
    assert "of_teacher" not in dict(numbers(next(r for r in read_records(run) if r.get("row") == report.TEACHER)))


def test_the_report_has_the_figures(tmp_path) -> None:
    run = write_run(tmp_path / "opd", [100], 0.9)
    table = report.write_report(run)
    assert len(table.columns) == 6
    data = json.loads((run / "report.json").read_text())["data"]
    assert data[report.DYNAMIC]["of_teacher"] == 0.9
    assert data[report.STATIC]["by_kind"] == RESULT.by_kind
    assert report.PERIODIC not in data


def test_mistakes_are_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "empty",), "empty: found no evaluation of a student on evaluation.data (metrics.jsonl); give run"),
        ((tmp_path, "--out", tmp_path / "x.pdf"), "x.pdf; expected a .png"),
    ]:
        assert message in opdlm("curves", *arguments, code=2)
