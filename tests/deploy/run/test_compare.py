"""`opdlm compare`: which runs it makes, and what its comparison says. `pytest tests/deploy/run/test_compare.py`"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.common.errors import OpdlmError
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe import report
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run import compare as compare_job
from opdlm.deploy.run.paths import absolute_paths
from tests.deploy.observe.test_records import QUEUE, ROUND, Listener

TASKS = ("add", "sort", "copy")


def base(teacher: Path, **sections) -> OpdlmConfig:
    raw = {
        "model": {"teacher": str(teacher), "dtype": "float32"},
        "data": {"task": "add+sort", "prompts": 20},
        "rollout": {"prompts_per_round": 8, "max_new_tokens": 9},
        "objective": {"top_k": 3, "tail": "bucket", "exclude_eos": False},
        "evaluation": {"tasks": list(TASKS), "max_new_tokens": 9},
    }
    return config_from_dict(raw | sections)


def fake_run(score_of):
    """Stands in for `train`: writes the records and the report that a run with these scores would write."""

    def train(config: OpdlmConfig, resume: bool, console: Console) -> int:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(absolute_paths(config)))
        records = RunRecords(folder, Listener(), parameters=(10, 10))

        def evaluate(row: str, version: int, scores: dict[str, float]) -> None:
            by_task = {t: {"exact_match": s, "token_match": s, "tokens_per_step": 2.0} for t, s in scores.items()}
            records.evaluated(row, version, EvaluationResult(10, 0.5, 2.0, 9.0, by_task))

        evaluate(report.TEACHER, 0, dict.fromkeys(TASKS, 1.0))
        evaluate(report.BEFORE, 0, dict.fromkeys(TASKS, 0.0))
        evaluate(report.PERIODIC, 0, dict.fromkeys(TASKS, 0.0))
        records.learned([ROUND | {"round": 1, "step": 1}], QUEUE)
        scores = score_of(config)
        for row in (report.STATIC, report.DYNAMIC):
            evaluate(row, 1, scores)
        records.close()
        report.write_report(folder)
        return 0

    return train


def test_missing_runs_are_made_and_compared(monkeypatch, tmp_path, chain_teacher) -> None:
    trained: list[OpdlmConfig] = []

    def score_of(config: OpdlmConfig) -> dict[str, float]:
        trained.append(config)
        kept = 0.5 if config.objective.kind == "opd" else 0.25
        return {"add": 0.75 + 0.25 * config.run.seed, "sort": 1.0, "copy": kept}

    monkeypatch.setattr(compare_job, "train", fake_run(score_of))
    out = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    assert compare_job.run_comparison(base(chain_teacher), ["opd", "cft"], [0, 1], tmp_path, out) == 0
    assert [(c.objective.kind, c.run.seed) for c in trained] == [("opd", 0), ("cft", 0), ("opd", 1), ("cft", 1)]
    assert trained[0].objective.tail == "bucket"
    assert (trained[1].objective.tail, trained[1].objective.top_k, trained[1].objective.resolved_selection) == (
        "drop",
        0,
        "random_mask",
    )
    assert trained[0].offline.cache == trained[1].offline.cache != trained[2].offline.cache

    result = json.loads((tmp_path / "compare.json").read_text())
    opd, cft = result["objectives"]["opd"], result["objectives"]["cft"]
    assert opd["tasks"]["add"]["static"] == {"mean": 0.875, "std": 0.125, "min": 0.75, "max": 1.0}
    assert opd["trained_dynamic"]["mean"] == pytest.approx((0.875 + 1.0) / 2)
    assert (opd["kept_static"]["mean"], cft["kept_static"]["mean"]) == (0.5, 0.25)
    assert result["teacher"]["copy"]["exact_match"] == 1.0
    assert {f.name for f in tmp_path.glob("*.png")} == {"compare.png", "retention.png"}
    assert "87.5±12.5" in out.export_text()

    assert compare_job.run_comparison(base(chain_teacher), ["opd", "cft"], [0, 1], tmp_path, out) == 0
    assert len(trained) == 4, "finished runs are not run again"
    other = base(chain_teacher, learner={"optimizer": {"lr": 0.5}})
    with pytest.raises(OpdlmError, match=r"holds a run of another config: learner.optimizer.lr \(was 1e-05, now 0.5\)"):
        compare_job.run_comparison(other, ["opd"], [0], tmp_path, out)
    report_file = tmp_path / "cft-seed1" / "report.json"
    stopped = json.loads(report_file.read_text())
    del stopped["by_task"][report.DYNAMIC]
    report_file.write_text(json.dumps(stopped))
    assert not compare_job._is_done(report_file.parent), "a run without its last evaluation is resumed"


def test_a_run_whose_time_is_over_ends_the_comparison_until_the_next_call(monkeypatch, tmp_path, chain_teacher) -> None:
    """It ends with code 0, but has no last evaluations."""
    begun = []
    monkeypatch.setattr(compare_job, "train", lambda config, **_: begun.append(config.run.dir) or 0)
    limited = base(chain_teacher, run={"max_minutes": 5})
    assert compare_job.run_comparison(limited, ["opd", "cft"], [0], tmp_path, Console(quiet=True)) == 0
    assert begun == [str(tmp_path / "opd-seed0")]
    assert not (tmp_path / "compare.json").exists()


def test_runs_on_own_prompts_are_compared_by_questions_of_ones_own(monkeypatch, tmp_path, chain_teacher) -> None:
    """Their prompts belong to no task, so the tables are those of `opdlm curves`."""
    prompts, questions = tmp_path / "prompts.jsonl", tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(20)))
    questions.write_text(json.dumps({"prompt": "1+1=", "answers": ["2"]}) + "\n")

    def train(config: OpdlmConfig, resume: bool, console: Console) -> int:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(absolute_paths(config)))
        records = RunRecords(folder, Listener(), parameters=(10, 10))
        records.learned([ROUND | {"round": 1, "step": 1}], QUEUE)
        share = 0.75 if config.objective.kind == "opd" else 0.5
        for row in (report.STATIC, report.DYNAMIC):
            right = EvaluationResult(1, share, 2.0, 9.0, {}, data_right=share, of_teacher=share, held_out_kl=0.5)
            records.evaluated(row, 1, right)
        records.close()
        report.write_report(folder)
        return 0

    monkeypatch.setattr(compare_job, "train", train)
    config = base(chain_teacher, data={"path": str(prompts)}, evaluation={"data": str(questions), "max_new_tokens": 9})
    config = config_from_dict(config.model_dump(mode="json") | {"objective": {"teacher_temperature": 0.5}})
    out = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    assert compare_job.run_comparison(config, ["opd", "cft"], [0], tmp_path / "out", out) == 0
    runs = json.loads((tmp_path / "out" / "curves.json").read_text())["runs"]
    assert [(run["name"], run["dynamic"][-1]["of_teacher"]) for run in runs] == [
        ("opd-seed0", 0.75),
        ("cft-seed0", 0.5),
    ]
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"curves.png"}
    text = out.export_text()
    assert "75.0%" in text
    assert "out/curves.json, curves.png" in text
    assert "compare.json" not in text


def test_mistakes_are_named_before_any_run(monkeypatch, tmp_path, chain_teacher) -> None:
    def train(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr(compare_job, "train", train)
    quiet = Console(quiet=True)
    with pytest.raises(OpdlmError, match="--objectives: found 'sft'; known: opd, opd_random_mask, off_policy_kd, cft"):
        compare_job.run_comparison(base(chain_teacher), ["opd", "sft"], [0], tmp_path, quiet)
    nothing = base(chain_teacher, evaluation={"final_problems": 0})
    with pytest.raises(OpdlmError, match="compare: needs prompts of a task"):
        compare_job.run_comparison(nothing, ["opd"], [0], tmp_path, quiet)
    with pytest.raises(OpdlmError, match="known tasks"):
        compare_job.run_comparison(
            base(chain_teacher, data={"task": "ad", "prompts": 9}, evaluation={"final_problems": 9}),
            ["opd"],
            [0],
            tmp_path,
            quiet,
        )
    strange = base(chain_teacher, evaluation={"tasks": ["copy"]})
    with pytest.raises(OpdlmError, match=r"evaluation.tasks: found \['copy'\], none of data.task add\+sort"):
        compare_job.run_comparison(strange, ["opd"], [0], tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []
