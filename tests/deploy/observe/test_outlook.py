"""Time left and GPU-hours. `pytest tests/deploy/observe/test_outlook.py`"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.deploy.observe.outlook import _BESIDE, Outlook, duration_text, gpus_reserved
from opdlm.deploy.observe.report import PERIODIC, write_report
from opdlm.deploy.observe.terminal import LiveView, PlainView


def config(**sections: Any) -> OpdlmConfig:
    base = {"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 10}, "rollout": {"max_new_tokens": 4000}}
    return config_from_dict(base | {name: base.get(name, {}) | section for name, section in sections.items()})


def round_(number: int, wall: float, **more: Any) -> dict[str, Any]:
    """The record of round `number`, from 1."""
    return {"kind": "round", "round": number, "wall_seconds": wall, **more}


def at(kind: str, wall: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "round": 0, "wall_seconds": wall, **more}


def test_nothing_is_known_before_a_round_and_what_comes_before_it_does_not_count() -> None:
    outlook = Outlook(config(), 11)
    for record in (at("data", 1), at("publish", 50), at("evaluation", 300, row="student before"), at("step", 330)):
        assert outlook.note(record) == {}
    assert outlook.seconds_left is None
    assert outlook.note(round_(1, 360)) == {"time_left_seconds": 10 * 60}
    assert outlook.note(at("publish", 361)) == {}
    assert outlook.note(round_(2, 480))["time_left_seconds"] == pytest.approx(9 * (60 + 120) / 2)
    for number in range(3, 12):
        figures = outlook.note(round_(number, 360 + 120 * (number - 1)))
    assert figures == {"time_left_seconds": 0}


def test_an_evaluation_beside_the_first_round_is_part_of_it() -> None:
    assert _BESIDE == PERIODIC
    for actors, seconds in ((0, 30), (1, 60)):
        outlook = Outlook(config(evaluation={"every_rounds": 1, "actors": actors}), 2)
        outlook.note(at("publish", 10))
        outlook.note(at("evaluation", 40, row=PERIODIC))
        assert outlook.note(round_(1, 70)) == {"time_left_seconds": seconds}


def test_a_resumed_run_knows_from_its_earlier_rounds_and_not_from_its_start() -> None:
    earlier = [at("data", 5), round_(1, 65), round_(2, 125)]
    outlook = Outlook(config(), 12, earlier)
    assert outlook.seconds_left == 10 * 60
    outlook.note(at("data", 500))
    outlook.note(at("publish", 900))
    assert outlook.note(round_(3, 960)) == {"time_left_seconds": 9 * 60}


def test_a_round_that_is_trained_again_counts_once() -> None:
    outlook = Outlook(config(), 4)
    outlook.note(at("data", 0))
    outlook.note(round_(1, 10))
    outlook.note(round_(2, 20))
    assert outlook.note(round_(2, 50)) == {"time_left_seconds": 2 * (10 + 30) / 2}


@pytest.mark.parametrize(("at_limit", "growth"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_growing_responses_make_the_rounds_longer(at_limit, growth) -> None:
    """The limit grows by 100 tokens a round, and a round takes one second for 100 tokens of the mean response."""
    schedule = {"kind": "linear", "start": 100, "end": 1100, "rounds": 10}
    outlook = Outlook(config(curriculum={"max_new_tokens": schedule}), 10)
    outlook.note(at("data", 0))
    wall, tokens = 0.0, 100.0
    for number in range(1, 5):
        wall += tokens / 100
        left = outlook.note(round_(number, wall, response_tokens_mean=tokens, ended_by_limit_share=at_limit))
        expected = sum((tokens + growth * 100 * ahead) / 100 for ahead in range(1, 10 - number + 1))
        assert left["time_left_seconds"] == pytest.approx(expected)
        tokens += growth * 100


def test_gpu_hours_are_counted_and_expected_across_a_resume_with_other_gpus() -> None:
    gpus = {"rollout": {"gpus_per_actor": 1, "actors": 4}, "teacher": {"gpus_per_actor": 0.5, "actors": 2}}
    first = config(learner={"workers": 2, "gpus_per_worker": 1}, evaluation={"every_rounds": 2, "actors": 1}, **gpus)
    assert gpus_reserved(first, {}) == 2 + 4 + 1 + 1
    assert gpus_reserved(first, {"rollout_actors": 6, "teacher_actors": 0}) == 2 + 6 + 1
    assert gpus_reserved(config(run={"replay": "r"}, **gpus), {}) == 0
    outlook = Outlook(first, 5)
    records = [at("data", 0), round_(1, 3600)]
    figures = [outlook.note(record) for record in records]
    assert figures[1] == {
        "time_left_seconds": 4 * 3600,
        "gpus_reserved": 8,
        "gpu_hours": 8,
        "gpu_hours_expected": 8 + 4 * 8,
    }
    earlier = [records[0], records[1] | figures[1]]
    second = Outlook(config(learner={"gpus_per_worker": 1}), 5, earlier)
    assert second.gpu_hours == 8
    second.note(at("data", 3600))
    assert second.note(round_(2, 7200)) | {"time_left_seconds": 0} == {
        "time_left_seconds": 0,
        "gpus_reserved": 1,
        "gpu_hours": 9,
        "gpu_hours_expected": 9 + 3,
    }
    assert "gpu_hours" not in Outlook(config(), 5, [at("data", 0)]).note(round_(1, 3600))


def test_the_report_counts_to_the_last_record(tmp_path) -> None:
    last = round_(1, 3600, step=1, rollout_tokens=1, gpu_hours=8.0, gpus_reserved=8.0)
    lines = [last, at("evaluation", 5400, row="x", by_task={})]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["gpu_hours"] == 8 + 8 * 0.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text) -> None:
    assert duration_text(seconds) == text


def test_both_views_show_what_is_left_and_count_it_down() -> None:
    now = [0.0]
    record = round_(3, 0, step=9, queue_depth=0, staleness_mean=0.0, weight_version=2, time_left_seconds=7500.0)
    record |= {"gpu_hours": 3.21, "gpu_hours_expected": 20.04}
    progress = {"kind": "progress", "round": 4, "rounds": 9, "stages": [], "tasks": []}
    plain = io.StringIO()
    view = PlainView(Console(file=plain, width=80), 9, clock=lambda: now[0])
    live = LiveView(console := Console(file=io.StringIO(), width=80, record=True), 9, 2, clock=lambda: now[0])
    console.print(live._render())
    assert "left" not in console.export_text()
    live.show(record)
    for second in (6.0, 600.0):
        now[0] = second
        view.show(record if second == 6 else progress)
    console.print(live._render())
    shown = console.export_text()
    assert "left about 1 h 55 min" in shown
    assert "GPU-hours 3.2 of about 20.0" in " ".join(shown.split())
    lines = plain.getvalue().splitlines()
    assert lines[0].endswith("version 2 | left about 2 h 05 min | GPU-hours 3.2 of about 20.0")
    assert lines[1] == "round 4/9: the learner starts | left about 1 h 55 min | GPU-hours 3.2 of about 20.0"
