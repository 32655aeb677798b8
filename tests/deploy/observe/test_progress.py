"""How far a long round is: what the driver counts, what views show. `pytest tests/deploy/observe/test_progress.py`"""

from __future__ import annotations

import io
from typing import Any

import pytest
from ray.exceptions import RayError
from rich.console import Console

from opdlm.actors.progress import BatchCount, CallProgress, Teller, Watch
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.progress import DECODED, SCORED, RunProgress
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.terminal import LiveView, PlainView, progress_lines
from opdlm.learner.schedule import TrainingSchedule
from tests.tiny import request

SCHEDULE = TrainingSchedule(total=40, prompts_per_round=16, batch_size=4, seed=0)


def stages(record: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    return {stage["name"]: (stage["done"], stage["total"], stage["ahead"]) for stage in record["stages"]}


class _Told:
    """A board without Ray: keeps what `note_progress.remote(call, progress)` is given."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, CallProgress]] = []

        class method:
            remote = staticmethod(lambda call, progress: self.heard.append((call, progress)))

        self.note_progress = method


def test_an_actor_tells_at_most_every_two_seconds() -> None:
    now, board = [0.0], _Told()
    tell = Teller(Watch(board, "decoded 3"), lambda: now[0])
    for second in range(5):
        now[0] = float(second)
        tell(lambda second=second: CallProgress((second,), 7 * second))
    assert board.heard == [("decoded 3", CallProgress((2,), 14)), ("decoded 3", CallProgress((4,), 28))]
    Teller(None)(lambda: pytest.fail("nobody watches, so nothing is counted"))
    count = BatchCount(Watch(board, "scored 1"), [8, 9, 10], [3, 4, 5])
    count([2, 0])
    assert count._progress() == CallProgress((10, 8), 8)


def test_counts_of_a_round_and_of_what_is_ahead_of_it() -> None:
    progress = RunProgress()
    progress.schedule, progress.board = SCHEDULE, "board"
    with progress.call(DECODED, range(10)) as first:
        (watch,) = first.watch
        assert watch.board == "board"
        told = {watch.call: CallProgress((1, 4), 50)}
        assert stages(progress.figures(told, 0.0)) == {DECODED: (2, 16, 0), "optimizer steps": (0, 4, 0)}
        first.tokens = 200
    with pytest.raises(RayError), progress.call(DECODED, range(10, 20)):
        raise RayError
    with progress.call(SCORED, range(10)), progress.call(DECODED, range(10, 20)) as second:
        told[second.watch[0].call] = CallProgress((10, 11, 16, 17), 90)
        figures = progress.figures(told, 5.0)
    assert stages(figures) == {DECODED: (12, 16, 2), SCORED: (0, 16, 0), "optimizer steps": (0, 4, 0)}
    decoded = figures["stages"][0]
    assert (decoded["per_second"], decoded["tokens_per_second"]) == ((14 - 2) / 5, (290 - 50) / 5)
    progress.at(0, 3)
    assert stages(progress.figures({}, 6.0))["optimizer steps"] == (3, 4, 0)
    progress.at(1, 4)
    assert stages(progress.figures({}, 7.0))[DECODED] == (4, 16, 0), "of the next round"
    progress.at(0, 2)  # the learner begins again, with samples that the queue has kept
    assert stages(progress.figures({}, 8.0)) == {
        DECODED: (16, 16, 4),
        SCORED: (16, 16, 0),
        "optimizer steps": (2, 4, 0),
    }
    progress.at(2, 8)
    assert stages(progress.figures({}, 9.0))["optimizer steps"] == (0, 2, 0), "the last round is smaller"
    progress.forget_samples()
    progress.at(1, 4)
    assert stages(progress.figures({}, 10.0)) == {"optimizer steps": (0, 4, 0)}
    progress.at(3, 10)
    assert "stages" not in progress.figures({}, 11.0), "all rounds are trained"


def test_tasks_are_counted_by_their_calls() -> None:
    progress = RunProgress()
    with progress.task("teacher responses", 100):
        with progress.call("teacher responses", range(40)) as call:
            assert call.watch == (), "nobody listens"
            call.tokens = 4000
        (task,) = progress.figures({}, 0.0)["tasks"]
        assert (task["done"], task["total"]) == (40, 100)
        with progress.call("teacher responses", range(60)):
            (task,) = progress.figures({}, 4.0)["tasks"]
    assert progress_lines({"tasks": [task]}) == ["teacher responses: 40 of 100"]
    assert progress.figures({}, 5.0)["tasks"] == []


def test_plain_lines_come_every_ten_seconds_in_a_long_round() -> None:
    now, out = [0.0], io.StringIO()
    view = PlainView(Console(file=out, width=80), 40, clock=lambda: now[0])
    stage = {"name": DECODED, "done": 96, "total": 128, "ahead": 0, "per_second": 0.82, "tokens_per_second": 410.4}
    steps = {"name": "optimizer steps", "done": 0, "total": 16, "ahead": 0, "per_second": 0.0}
    task = {"name": "evaluation of round 2, student", "done": 5, "total": 9, "per_second": 12.3}
    record = {"kind": "progress", "round": 3, "rounds": 40, "stages": [stage, steps], "tasks": [task]}
    for second in range(0, 32, 2):
        now[0] = float(second)
        view.show(record)
    lines = out.getvalue().splitlines()
    assert lines[:2] == [
        "evaluation of round 2, student: 5 of 9 (12/s)",
        "round 3/40: decoded 96 of 128 (0.82/s, 410 tokens/s), optimizer steps 0 of 16",
    ]
    assert len(lines) == 2 * 3, "at 10, 20 and 30 s"


def test_the_live_view_shows_the_round_and_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, record=True)
    view = LiveView(console, 1000, 12)
    each = {"total": 1024, "per_second": 123.4, "tokens_per_second": 123456.0, "ahead": 1024}
    made = [{"name": DECODED, "done": 999} | each, {"name": SCORED, "done": 1000} | each]
    view.show({"kind": "progress", "round": 13, "rounds": 1000, "stages": made, "tasks": []})
    step = {"kind": "step", "step": 123456, "loss": 1.5, "grad_norm": 2.0, "learning_rate": 1e-3}
    view.show(step)
    view.show(
        {"kind": "evaluation", "row": "student dynamic", "round": 1000, "exact_match": 1.0, "tokens_per_step": 4.0}
    )
    console.print(view._render())
    text = console.export_text()
    assert "round 13/1000: decoded 999 of 1,024 (123/s, 123,456 tokens/s; 1,024 ahead)," in text
    assert "student dynamic, round 1000" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_evaluations_carry_their_round_and_a_death_is_one_line(tmp_path) -> None:
    out = io.StringIO()
    records = RunRecords(tmp_path, PlainView(Console(file=out, width=80), 40), first_round=3)
    records.evaluated("student", 2, EvaluationResult(10, 0.5, 2.0, 60.0, {}))
    records.actor_died("rollout-0", "it was killed")
    records.queue_died("it was killed")
    records.close()
    assert out.getvalue().splitlines() == [
        "evaluation of round 2, student: exact match 50.0%, 2.00 tokens/step, 60 tokens/s",
        "rollout-0 died: it was killed",
        "replay-queue died: it was killed; going back to the last checkpoint",
    ]


def test_a_long_evaluation_prints_lines_where_there_is_no_terminal() -> None:
    now, out = [0.0], io.StringIO()
    meter = Meter(Console(file=out, width=80), clock=lambda: now[0])
    with meter:
        for name in ("static", "[2/2] block 4, dynamic 0.9"):
            meter.begin(name, 1000)
            for second in range(0, 25, 5):
                now[0] += 5
                meter(8 * second)
    assert out.getvalue().splitlines() == [
        "static: 40 of 1,000 answered (4/s)",
        "static: 120 of 1,000 answered (6/s)",
        "[2/2] block 4, dynamic 0.9: 40 of 1,000 answered (4/s)",
        "[2/2] block 4, dynamic 0.9: 120 of 1,000 answered (6/s)",
    ]


def test_decoders_say_how_many_prompts_are_answered(chain_teacher, tmp_path) -> None:
    convert_checkpoint(chain_teacher, tmp_path / "student", 4, "absolute")
    for folder in (chain_teacher, tmp_path / "student"):
        decoder, told = CheckpointDecoder(folder), []
        decoder.on_progress = told.append
        requests = [request(3, i, 4 + 3 * i, vocab=17) for i in range(5)]
        decoder.answer(requests, decoder.base, 2)
        assert told == sorted(told)
        assert len(set(told)) > 2
