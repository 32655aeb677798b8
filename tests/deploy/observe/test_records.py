"""Records and their figures, views, report, evaluation, run directory. `pytest tests/deploy/observe/test_records.py`"""

from __future__ import annotations

import asyncio
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from opdlm.actors.pool import ActorPool
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.evaluate.held_out import EvaluationResult, HeldOutProblems
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.report import DYNAMIC, PERIODIC, STATIC, TEACHER, write_report
from opdlm.deploy.observe.round_figures import idle_share
from opdlm.deploy.observe.terminal import LiveView, PlainView
from opdlm.deploy.run.directory import truncate_metrics
from tests.system.full_disk import no_file_above

QUEUE = {"queue_depth": 3, "queue_leased": 0, "queue_free_slots": 5, "weight_version": 1}
STEP = {"kind": "step", "loss": 1.5, "grad_norm": 2.0, "learning_rate": 1e-3}
ROUND = {"kind": "round", "rollout_tokens": 100, "round_tokens": 100, "staleness_mean": 0.0, "train_seconds": 2.0}
ROUND |= {"train_forward_tokens": 1000}


def result(exact_match: float, tokens_per_step: float, tokens_per_second: float) -> EvaluationResult:
    figures = {"exact_match": exact_match, "tokens_per_step": tokens_per_step}
    return EvaluationResult(10, exact_match, tokens_per_step, tokens_per_second, {"chain": figures})


def _run(folder, view) -> None:
    records = RunRecords(folder, view, parameters=(10, 100))
    records.evaluated(TEACHER, 0, result(0.9, 1.0, 50.0))
    records.pushed(WeightHandle(0, [], 8), 0.5)
    for round_ in (1, 2):
        records.decoded(DecodeStats(0, 4, 80, 40, 12, 300, 2.0))
        records.scored(ScoreStats(80, 90, 0.5, 160))
        records.decoded(DecodeStats(0, 1, 20, 10, 10, 100, 2.0))
        records.scored(ScoreStats(20, 30, 0.5, 40))
        records.learned([STEP | {"round": round_ - 1, "step": round_}], QUEUE)
        records.learned([ROUND | {"round": round_, "step": round_, "rollout_tokens": 100 * round_}], QUEUE)
        records.evaluated(PERIODIC, round_, result(0.1 * round_, 2.0, 60.0))
    for row in (STATIC, DYNAMIC):
        records.evaluated(row, 2, result(0.8, 3.0, 70.0))
    records.close()


class Listener:
    def __init__(self) -> None:
        self.records: list[dict] = []

    def show(self, record: dict) -> None:
        self.records.append(record)


def test_figures_of_a_round(tmp_path) -> None:
    listener = Listener()
    _run(tmp_path, listener)
    written = read_records(tmp_path)
    assert written == listener.records
    first = next(r for r in written if r["kind"] == "round")
    assert first["tokens_per_step"] == pytest.approx(100 / 50)
    assert first["rollout_tokens_per_second"] == pytest.approx(100 / 4.0)
    assert first["teacher_tokens_per_second"] == pytest.approx(100 / 1.0)
    assert first["learner_tokens_per_second"] == pytest.approx(100 / 2.0)
    assert first["target_bytes_per_token"] == pytest.approx(2.0)
    assert first["response_tokens_mean"] == pytest.approx(20.0)
    assert first["weight_push_seconds"] == 0.5
    assert (first["rollout_forward_tokens"], first["teacher_forward_tokens"]) == (400, 120)
    # 2N FLOP per token of a forward, 6N per trained token. The second round adds to the first, a resumed run to both.
    one_round = 10 * (2 * 400 + 6 * 1000) + 100 * 2 * 120
    assert [r["compute_flops"] for r in written if r["kind"] == "round"] == [one_round, 2 * one_round]
    resumed = RunRecords(tmp_path, listener, parameters=(10, 100))
    resumed.given(3, 50, cached=True)
    resumed.close()
    assert listener.records[-1]["compute_flops"] == 2 * one_round + 2 * 100 * 50
    again = RunRecords(tmp_path, listener, parameters=(10, 100))
    again.given(3, 50, cached=True)  # resumed again: generated once, counted once
    again.close()
    assert listener.records[-1]["compute_flops"] == 2 * one_round + 2 * 100 * 50
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_idle_shares_and_why_responses_ended(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(
        "opdlm.deploy.observe.records.time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0])
    )
    records = RunRecords(tmp_path, listener := Listener())
    place = {"round": 0, "step": 0}
    records.learned([{"kind": "publish", "publish_seconds": 1.0} | place], QUEUE)
    records.pushed(WeightHandle(0, [], 64), 0.5)
    for sequences, ended in ((4, 3), (1, 0)):
        records.decoded(DecodeStats(0, sequences, 80, 40, 12, 300, 3.0, ended_by_eos=ended))
    records.scored(ScoreStats(160, 180, 4.0, 160))
    now[0] = 10.0
    records.learned([ROUND | {"round": 1, "step": 1}], QUEUE | {"rollout_actors": 2, "teacher_actors": 1})
    records.learned([{"kind": "checkpoint", "checkpoint_seconds": 1.0, "round": 1, "step": 1}], QUEUE)
    now[0] = 14.0
    records.learned([ROUND | {"round": 2, "step": 2}], QUEUE | {"rollout_actors": 0, "teacher_actors": 0})
    records.close()
    first, second = (r for r in listener.records if r["kind"] == "round")
    assert first["rollout_idle_share"] == pytest.approx(1 - 6 / (2 * 10))
    assert first["teacher_idle_share"] == pytest.approx(1 - 4 / 10)
    assert first["learner_idle_share"] == pytest.approx(1 - (1 + 2) / 10), "it published and trained"
    assert (first["ended_by_eos_share"], first["ended_by_limit_share"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert (first["weight_push_seconds"], first["weight_push_bytes"]) == (0.5, 64)
    assert second["learner_idle_share"] == pytest.approx(1 - (1 + 2) / 4), "it saved and trained"
    assert not {"rollout_idle_share", "teacher_idle_share", "ended_by_eos_share"} & second.keys(), "a replay has none"
    assert idle_share(12.0, 1, 10.0) == 0.0


def test_report(tmp_path) -> None:
    _run(tmp_path, Listener())
    table = write_report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher_exact_match"] == 0.9
    assert report["student_exact_match_before"] is None
    assert report["student_exact_match_dynamic"] == 0.8
    assert report["tokens_per_step_dynamic"] == 3.0
    assert (report["rollout_tokens"], report["optimizer_steps"], report["weight_version"]) == (200, 2, 2)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert table.row_count == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_views_show_the_main_figures(tmp_path, terminal) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140)
    view = LiveView(console, 2, 0) if terminal else PlainView(console, 2)
    _run(tmp_path, view)
    if terminal:
        console.print(view._render())
    text = out.getvalue()
    assert "1.5000" in text
    assert "80.0%" in text
    words = ["queue depth", "staleness", "weight version"] if terminal else ["round 2/2", "queue 3", "version 1"]
    assert [w for w in words if w not in text] == []


def test_resume_drops_the_records_of_rounds_that_are_trained_again(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"kind": "step", "round": 0},
        {"kind": "round", "round": 1},
        {"kind": "step", "round": 1},
        {"kind": "round", "round": 2},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"kind": "st')
    truncate_metrics(file, 1)
    assert read_records(tmp_path) == rows[:2]


def test_answers_count_only_if_whole_and_ended() -> None:
    task = get_task("chain")
    tokenizer = build_char_tokenizer(task.alphabet)
    held_out = HeldOutProblems([task], tokenizer, 4)
    right = [np.array([*tokenizer(p.solution)["input_ids"], tokenizer.eos_token_id]) for _, p in held_out.problems]
    assert held_out.exact_match(right) == 1.0
    unfinished = [right[0][:-1], right[1], right[2][1:], np.array([], dtype=np.int32)]
    assert held_out.exact_match(unfinished) == 0.25


def test_results_are_also_by_task() -> None:
    tasks = [get_task("add"), get_task("sort")]
    tokenizer = build_char_tokenizer(tasks[0].alphabet)
    held_out = HeldOutProblems(tasks, tokenizer, 3)
    right = [np.array([*tokenizer(p.solution)["input_ids"], tokenizer.eos_token_id]) for _, p in held_out.problems]
    answers = [*right[:3], right[3], right[3][:-1], right[3][:-1]]  # all sums, one of three sortings
    marked = held_out.result(answers, steps=[len(a) if i < 3 else 2 for i, a in enumerate(answers)], seconds=2.0)
    assert marked.exact_match == pytest.approx(4 / 6)
    assert marked.by_task["add"] == {"exact_match": 1.0, "token_match": 1.0, "tokens_per_step": 1.0}
    assert 1 / 3 < marked.by_task["sort"]["token_match"] < 1
    shifted = held_out.result([a[1:] for a in right], steps=[1] * 6, seconds=2.0)
    assert (shifted.exact_match, shifted.by_task["add"]["token_match"] < 0.5) == (0.0, True)
    assert marked.by_task["sort"]["exact_match"] == pytest.approx(1 / 3)
    assert marked.by_task["sort"]["tokens_per_step"] == pytest.approx(sum(map(len, answers[3:])) / 6)
    assert marked.tokens_per_second == pytest.approx(sum(map(len, answers)) / 2)
    assert [r.prompt_id for r in held_out.requests(5)][2:4] == ["add/test/2", "sort/test/3"]


class _Silent:
    """An actor handle whose calls are never answered."""

    class wait:
        @staticmethod
        def options(num_returns: int):
            return _Silent.wait

        @staticmethod
        def remote():
            return asyncio.get_running_loop().create_future()


def test_a_wait_that_takes_too_long_names_the_role() -> None:
    async def scenario() -> None:
        await ActorPool({"teacher-0": _Silent()}, timeout_seconds=0.01, restarts=2).call("wait")

    with pytest.raises(OpdlmError, match=r"teacher-0\.wait: no answer in 0\.01 s .resources\.call_timeout_seconds."):
        asyncio.run(scenario())


def test_metrics_survive_a_disk_that_is_full_when_a_run_is_resumed(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "round": round_, "note": "x" * 50}) + "\n" for round_ in range(20)]
    file.write_text("".join(lines))
    with no_file_above(500), pytest.raises(OSError, match="File too large"):
        truncate_metrics(file, 15)
    assert file.read_text() == "".join(lines)
    truncate_metrics(file, 15)
    assert file.read_text() == "".join(lines[:15])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_records_after_the_checkpoint_of_the_first_start_are_dropped_too(tmp_path) -> None:
    """The driver resumed at round 2; its learner finds that checkpoint damaged, and goes on from round 1."""
    _run(tmp_path, Listener())
    records = RunRecords(tmp_path, Listener(), first_round=2, first_step=2)
    records.went_back("the checkpoint of round 2 is damaged")
    records.learned([{"kind": "learner_start", "round": 1, "step": 1}], QUEUE)
    records.learned([STEP | {"round": 1, "step": 2}, ROUND | {"round": 2, "step": 2}], QUEUE)
    records.close()
    found = read_records(tmp_path)
    assert [r["step"] for r in found if r["kind"] == "step"] == [1, 2]
    assert [r["round"] for r in found if r["kind"] == "round"] == [1, 2]
    assert [r["reason"] for r in found if r["kind"] == "damaged_checkpoint"] == ["the checkpoint of round 2 is damaged"]
