"""No table loses a cell at 80 columns. `pytest tests/deploy/observe/test_tables.py`"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import Strategy
from opdlm.common.data.tasks import TASKS
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.types import DecodeStats
from opdlm.deploy.cli import app
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.evaluate.lm_eval import result_tables
from opdlm.deploy.evaluate.sweep import SweepPoint, Way, _table
from opdlm.deploy.observe import comparison
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import BEFORE, DYNAMIC, STATIC, TEACHER, write_report
from opdlm.deploy.observe.session import show_end
from opdlm.deploy.observe.tables import decoding_name
from opdlm.deploy.run.compare import OBJECTIVES
from tests.deploy.observe.test_records import QUEUE, ROUND, STEP, Listener

STRATEGIES: tuple[str, ...] = get_args(Strategy)


def shown(*tables: Table) -> str:
    console = Console(file=io.StringIO(), width=80, record=True)
    for table in tables:
        console.print(table)
    return checked(console.export_text())


def checked(text: str) -> str:
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    return text


def words(text: str) -> str:
    return " ".join(text.split())


def test_short_names_tell_all_ways_of_decoding_apart() -> None:
    names = [decoding_name(s, t) for s in STRATEGIES for t in (0.5, 0.95)]
    of_one = {"static", "sequential", "entropy", "random", "verified"}
    with_threshold = {f"{name} {t}" for name in ("dynamic", "sequential dynamic") for t in (0.5, 0.95)}
    assert of_one | with_threshold == set(names)
    assert decoding_name("low_confidence_dynamic") == "dynamic"


def test_eval_and_sweep(chain_teacher, tmp_path) -> None:
    folder = tmp_path / f"a-rather-long-name-of-a-run-{'x' * 60}"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    of_any_student = [name for name in STRATEGIES if name != "verified"]
    strategies = [part for name in of_any_student for part in ("--strategy", name)]
    asked = ["eval", str(folder), "--task", "chain", "--problems", "3", "--max-new-tokens", "4", *strategies]
    result = CliRunner().invoke(app, asked, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    text = checked(result.output)
    lines = [line.split("  ")[0].rstrip() for line in text.splitlines()]
    assert [
        n
        for n in ("static", "dynamic 0.9", "entropy", "sequential", "sequential dynamic 0.9", "random")
        if n not in lines
    ] == []
    points = [SweepPoint("runs/a", Way(1024, s, 0.955), 1.0, 0, 123.45, 1234567.0) for s in STRATEGIES]  # type: ignore[arg-type]
    text = shown(_table("runs/a: 1,000 rows", "exact match", points))
    assert text.count("1,234,567") == len(STRATEGIES)
    assert "dynamic 0.955 " in text


def test_reports_of_runs_with_and_without_evaluations(tmp_path) -> None:
    assert "student after, dynamic" in shown(write_report(_run(tmp_path / "a", evaluated=True)))
    folder = _run(tmp_path / "b", evaluated=False)
    text = words(shown(write_report(folder)))
    for part in (
        "rounds 2",
        "optimizer steps 2",
        "response tokens 1,200",
        "mean loss of the first and last round 1.5000 → 0.5000",
        "tokens per denoising step, first and last round 1.00 → 4.00",
    ):
        assert part in text
    report = json.loads((folder / "report.json").read_text())
    assert (report["loss_first_round"], report["loss_last_round"]) == (1.5, 0.5)
    assert "held-out" not in text
    with_score, without = (imread(tmp_path / run / "report.png").shape[0] for run in "ab")
    assert without < with_score, "no empty plot of a score that was not measured"
    assert "rounds 0" in words(shown(write_report(_run(tmp_path / "c", evaluated=False, rounds=0))))


def test_a_report_and_its_plot_name_the_order_that_a_student_was_decoded_in(tmp_path, monkeypatch) -> None:
    drawn: list[list[str]] = []

    def legend_of(figure: Any, file: Path) -> None:
        drawn.append([text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()])

    monkeypatch.setattr("opdlm.deploy.observe.figures.save_figure", legend_of)
    in_order = (None, "sequential", "sequential", "sequential_dynamic")
    by_confidence = (None, "low_confidence_static", "low_confidence_static", "low_confidence_dynamic")
    for name, strategies, named in (
        ("a", in_order, ("before (sequential)", "after, sequential", "after, sequential dynamic")),
        ("b", by_confidence, ("before (static)", "after, static", "after, dynamic")),
    ):
        text = words(shown(write_report(_run(tmp_path / name, evaluated=True, strategies=strategies))))
        assert "teacher (autoregressive) 100.0%" in text
        for title in named:
            assert f"student {title} 100.0%" in text
        last = named[-1].removeprefix("after, ")
        assert {f"student, {last} decoding", f"evaluation, {last} decoding"} < set(drawn.pop())


@pytest.mark.parametrize("chat", [True, False])
def test_the_end_says_how_to_try_the_student(tmp_path, chat) -> None:
    folder = _run(tmp_path / "run", evaluated=False)
    data = {"path": "p", "chat_template": True} if chat else {"task": "chain", "prompts": 9}
    config = config_from_dict({"model": {"teacher": "t"}, "data": data, "run": {"dir": str(folder)}})
    console = Console(file=io.StringIO(), width=80, record=True)
    show_end(config, (8, 16), stopped=False, console=console)
    last = console.export_text().splitlines()[-1]
    assert last.startswith(f"try it: opdlm generate {folder}/student --prompt ")
    assert last.endswith("'your prompt' --chat") == chat
    show_end(config, (8, 16), stopped=True, console=console)
    assert console.export_text().splitlines()[-1].endswith("go on with --resume")


def _run(folder: Path, evaluated: bool, rounds: int = 2, strategies: Sequence[str | None] = (None,) * 4) -> Path:
    folder.mkdir()
    records = RunRecords(folder, Listener())
    for round_ in range(1, rounds + 1):
        records.decoded(DecodeStats(0, 1, 100 * round_**2, 100, 1, 1, 1.0))
        step = STEP | {"round": round_ - 1, "step": round_, "loss": 2.5 - round_}
        records.learned([step], QUEUE)
        records.learned([ROUND | {"round": round_, "step": round_, "rollout_tokens": 600 * round_}], QUEUE)
    rows = (TEACHER, BEFORE, STATIC, DYNAMIC) if evaluated else ()
    for row, strategy in zip(rows, strategies, strict=False):
        records.evaluated(row, 2, EvaluationResult(1000, 1.0, 123.45, 1234567.8, {}), strategy=strategy)
    records.close()
    return folder


def test_comparisons_of_all_objectives_on_all_tasks() -> None:
    spread = {"mean": 1.0, "std": 0.125, "min": 0.5, "max": 1.0}
    of_task = {"static": spread, "dynamic": spread, "tokens": spread}
    figures = dict.fromkeys(("trained_static", "trained_dynamic", "trained_tokens_per_step"), spread)
    budget = {
        "rollout_tokens": {"mean": 12_345_678},
        "compute_flops": {"mean": 1.23e19},
        "wall_seconds": {"mean": 123456.0},
    }
    summary = {name: {"tasks": dict.fromkeys(TASKS, of_task), **figures, **budget} for name in OBJECTIVES}
    before = {task: {"exact_match": 1.0, "token_match": 1.0} for task in TASKS}
    result = {"teacher": before, "student_before": before, "objectives": summary, "trained_tasks": list(TASKS)}
    text = shown(comparison._budget_table(summary))
    assert [name for name in OBJECTIVES if name not in text] == []
    assert text.count("12,345,678") == len(OBJECTIVES)
    text = shown(comparison._task_table(result, "solution tokens in the right place,", "tokens", "token_match"))
    assert text.count("100.0±12.5") == len(OBJECTIVES) * len(TASKS)
    assert [name for name in TASKS if f"{name} *" not in text] == []


def test_lm_evals_results_have_headers() -> None:
    results = {
        "results": {
            "gsm8k_cot_zeroshot_with_a_long_name": {
                "alias": " - gsm8k_cot_zeroshot_with_a_long_name",
                "exact_match,strict-match": 0.123456,
                "exact_match_stderr,strict-match": 0.01,
                "exact_match,flexible-extract": 1.0,
                "exact_match_stderr,flexible-extract": "N/A",
                "sample_len": 6,
            },
            "local": {"alias": "local", "prompt_level_strict_acc,none": 0.5},
        },
        "n-shot": {"gsm8k_cot_zeroshot_with_a_long_name": 5},
        "groups": {"everything": {"alias": "everything", "acc,none": 0.25}},
    }
    tables = result_tables(results)
    assert [t.row_count for t in tables] == [3, 1]
    text = shown(*tables)
    assert all(header in text for header in ("task", "metric", "value", "stderr", "shots", "group of tasks"))
    assert "gsm8k_cot_zeroshot_with" in text
    assert "0.1235 0.0100 5" in words(text)
    assert "prompt_level_strict_acc" in text


def test_plans(chain_teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = tmp_path / "run.yaml"
    numbers = {"dtype": "float32"}
    sections = {"run": {"dir": f"/no/{'long' * 30}"}, "model": {"teacher": str(chain_teacher)} | numbers}
    sections |= {"data": {"task": "chain", "prompts": 100}, "rollout": {"max_new_tokens": 20}, "teacher": numbers}
    file.write_text(yaml.safe_dump(sections))

    def plan(*settings: str) -> str:
        asked = ["plan", str(file), *(part for setting in settings for part in ("--set", setting))]
        result = CliRunner().invoke(app, asked, env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        return words(checked(result.output))

    assert "not checked" not in plan()
    text = plan("rollout.gpus_per_actor=1", "rollout.actors=3")
    assert (
        "not checked: the run needs 3 GPUs, this machine has no GPUs, and the plan does not know your cluster" in text
    )
    text = plan("rollout.gpus_per_actor=1", "resources.ray_address=10.0.0.1:6379")
    assert "not checked: whether the cluster at 10.0.0.1:6379 has 1 GPU; the run checks it when it joins" in text
    text = plan("rollout.placement.node_resources={decode: 2}")
    assert "not checked: the run needs 2 `decode`" in text
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    assert "the run needs 1 GPU; this machine has 4" in plan("rollout.gpus_per_actor=1")


def test_the_end_says_why_it_came_early_which_student_is_best_and_how_a_part_goes_on(tmp_path) -> None:
    folder = _run(tmp_path / "my run", evaluated=False)
    best = {"kind": "evaluation", "row": "student", "round": 1, "exact_match": 0.5, "by_task": {}, "wall_seconds": 9}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(best | {"tokens_per_step": 1.0, "best_by": "max exact_match"}) + "\n")
    (folder / "best" / "round-000001").mkdir(parents=True)
    sections = {"model": {"teacher": "t"}, "data": {"path": "p"}, "run": {"dir": str(folder), "max_minutes": 110}}

    def said(rounds: int, **how: Any) -> list[str]:
        console = Console(file=io.StringIO(), width=80, record=True)
        show_end(config_from_dict(sections), (8, 8 * rounds), console=console, **how)
        return console.export_text().splitlines()

    lines = said(5, stopped=False, early_stop="it was not better")
    assert "training ended early, after round 2 of 5: it was not better" in lines
    assert f"best student: round 1, exact_match 0.5: {folder}/best/round-000001" in lines
    assert "early" not in "".join(said(2, stopped=False, early_stop="only the last round was left"))
    assert said(5, stopped=True, time_over=True)[-1] == (
        "stopped after round 2 of 5, its 110 minutes are over; go on with: "
        f"opdlm train '{folder}/config.yaml' --resume --minutes 110"
    )
