"""The best student of a run, and early stop. `pytest tests/deploy/evaluate/test_best.py`"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import KeepBestConfig
from opdlm.common.errors import ConfigError
from opdlm.deploy.evaluate.best import BestStudent, best_figures, check_best_figure
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe.report import PERIODIC, figure_of, kept_best

NAN = float("nan")


def follow(root: Path, values: list[float], every: int = 10, checkpoints: tuple[int, ...] = (), **settings: Any):
    """A run whose evaluations give these values, with checkpoints of these rounds; kept students are empty folders."""
    best, records = BestStudent(root, KeepBestConfig(**settings)), []
    assert best.restore([]) is None
    for version, value in zip(range(0, 1000, every), values, strict=False):
        for rounds in checkpoints:
            if version - every < rounds <= version:
                (root / "checkpoints" / f"round-{rounds:06d}").mkdir(parents=True)
        if better := best.is_better(value):
            best.folder(version).mkdir(parents=True)
        best.note(version, value, better)
        record = {"kind": "evaluation", "row": PERIODIC, "round": version, "exact_match": value, "by_task": {}}
        records.append(record | ({"best_by": best.label} if better else {}))
    return best, records


def kept(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "best").glob("*"))


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([0.1, 0.5, 0.3], "max", 10),
        ([0.1, 0.5, 0.5], "max", 10),  # the first of equal ones
        ([3.0, 2.0, 1.0], "min", 20),
        ([NAN, 0.0, NAN], "max", 10),
        ([0.5, 0.4, 0.3], "max", 0),
    ],
)
def test_the_best_and_only_it_is_kept_at_the_end(tmp_path, values, mode, best) -> None:
    student, records = follow(tmp_path, values, mode=mode)
    student.prune(last=True)
    assert kept(tmp_path) == [f"round-{best:06d}"]
    found = kept_best(tmp_path, records)
    assert (found["round"], found["value"], found["mode"]) == (best, values[best // 10], mode)
    assert found["folder"] == str(tmp_path / "best" / f"round-{best:06d}")


def test_without_a_number_nothing_is_kept(tmp_path) -> None:
    assert kept_best(tmp_path, follow(tmp_path, [NAN, NAN])[1]) is None


@pytest.mark.parametrize(
    ("values", "settings", "waited"),
    [
        ([0.1, 0.2, 0.3], {}, None),
        ([0.1, 0.2, 0.2], {}, None),
        ([0.1, 0.2, 0.2, 0.1], {}, 2),
        ([0.1, 0.2, 0.2, 0.3, 0.3], {}, None),
        ([0.1, 0.14, 0.18, 0.22], {"min_delta": 0.1}, None),  # slow, but it gets there
        ([0.1, 0.14, 0.18], {"min_delta": 0.1}, 2),
        ([3.0, 2.0, 2.5, 2.5], {"mode": "min"}, 2),
        ([NAN, NAN], {}, 2),
    ],
)
def test_training_ends_after_evaluations_that_are_not_better(tmp_path, values, settings, waited) -> None:
    why = follow(tmp_path, values, patience=2, **settings)[0].enough()
    assert (why is None) == (waited is None)
    if waited:
        assert f"in {waited} evaluations in a row (checkpoint.keep_best.patience 2)" in why
    assert follow(tmp_path / "patient", values, **settings)[0].enough() is None


def test_a_slow_rise_is_kept_though_it_is_not_waited_for(tmp_path) -> None:
    student, _ = follow(tmp_path, [0.1, 0.14, 0.18], min_delta=0.1, patience=2)
    student.prune(last=True)
    assert kept(tmp_path) == ["round-000020"]


def test_the_best_of_each_checkpoint_stays_for_a_resume_from_it(tmp_path) -> None:
    _, records = follow(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.3], checkpoints=(15, 35))
    assert kept(tmp_path) == ["round-000010", "round-000030"], "of round 15, and of 35 and now"
    again = BestStudent(tmp_path, KeepBestConfig(patience=2))
    assert again.restore([r for r in records if r["round"] <= 15]) is None, "the newest checkpoint is damaged"
    assert kept(tmp_path) == ["round-000010"], "what comes after it is made again"
    assert again.is_better(0.25)
    assert not again.is_better(0.2)


def test_before_any_checkpoint_the_student_of_the_start_stays(tmp_path) -> None:
    _, records = follow(tmp_path, [0.1, 0.2, 0.3])
    assert kept(tmp_path) == ["round-000000", "round-000020"]
    again = BestStudent(tmp_path, KeepBestConfig())
    assert again.restore(records[:1]) is None
    assert kept(tmp_path) == ["round-000000"]


@pytest.mark.parametrize("resumed_after", range(1, 6))
def test_a_resumed_run_chooses_and_ends_as_an_unbroken_one(tmp_path, resumed_after) -> None:
    values, settings = [0.1, 0.3, 0.2, 0.4, 0.4, 0.35], {"patience": 2}
    whole, records = follow(tmp_path / "whole", values, **settings)
    first, _ = follow(tmp_path / "parts", values[:resumed_after], checkpoints=(0, 10, 20, 30, 40), **settings)
    second = BestStudent(tmp_path / "parts", first.settings)
    assert second.restore(records[:resumed_after]) is None
    for number, value in enumerate(values[resumed_after:], start=resumed_after):
        assert second.enough() is None
        if better := second.is_better(value):
            second.folder(10 * number).mkdir()
        assert better == ("best_by" in records[number])
        second.note(10 * number, value, better)
    for best in (whole, second):
        best.prune(last=True)
    assert second.enough() == whole.enough() != None  # noqa: E711
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole") == ["round-000030"]


def test_lost_students_are_named_and_do_not_count(tmp_path) -> None:
    _, records = follow(tmp_path, [0.1, 0.5, 0.3])
    best = BestStudent(tmp_path, KeepBestConfig())
    best.folder(10).rmdir()
    note = best.restore(records)
    assert (
        f"{tmp_path}/best/round-000010 is gone; the best is chosen among those that are kept and those to come" in note
    )
    assert best.is_better(0.2)
    assert kept_best(tmp_path, records)["round"] == 0
    other = BestStudent(tmp_path, KeepBestConfig(mode="min"))
    assert "no student was kept by min exact_match so far" in other.restore(records)


def test_an_unknown_figure_is_refused_with_those_that_there_are() -> None:
    assert check_best_figure(None, []) is None
    assert check_best_figure(KeepBestConfig(figure="add/token_match"), ["add", "sort"]) is None
    with pytest.raises(ConfigError) as caught:
        check_best_figure(KeepBestConfig(figure="accuracy"), ["add"])
    assert str(caught.value) == (
        "checkpoint.keep_best.figure: found 'accuracy'; this run's evaluations have exact_match, tokens_per_step, "
        "add/exact_match, add/token_match, add/tokens_per_step"
    )


def test_every_figure_that_is_named_is_in_the_evaluations() -> None:
    by_task = {"a": {"exact_match": 0.1, "token_match": 0.2, "tokens_per_step": 0.3}}
    result = EvaluationResult(4, 0.5, 0.6, 0.7, by_task)
    record = {name: getattr(result, name) for name in EvaluationResult.__slots__}
    assert [figure_of(record, name) for name in best_figures(["a"])] == [0.5, 0.6, 0.1, 0.2, 0.3]


def test_figures_of_questions_with_accepted_answers() -> None:
    record = dict.fromkeys(("data_right", "agreement", "token_agreement", "held_out_kl"), 0.5)
    record |= {"of_teacher": None, "by_kind": {"capitals": {"right": 0.25}}, "by_task": {}}
    names = best_figures([], ["capitals"])[2:]
    assert names == ["data_right", "of_teacher", "agreement", "token_agreement", "held_out_kl", "capitals/right"]
    values = [figure_of(record, name) for name in names]
    assert math.isnan(values[1]), "the teacher had none right"
    assert values[:1] + values[2:] == [0.5, 0.5, 0.5, 0.5, 0.25]
    assert check_best_figure(KeepBestConfig(figure="capitals/right"), [], ["capitals"]) is None
    alone = best_figures([], ["capitals"], has_teacher=False)
    assert alone == ["exact_match", "tokens_per_step", "data_right", "capitals/right"]
    with pytest.raises(ConfigError, match="found 'of_teacher'; this run's evaluations have exact_match"):
        check_best_figure(KeepBestConfig(figure="of_teacher"), [], ["capitals"], has_teacher=False)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"checkpoint": {"keep_best": {}}}, "checkpoint.keep_best: found without evaluation.every_rounds"),
        (
            {"checkpoint": {"keep_best": {}}, "run": {"replay": "r"}},
            "checkpoint.keep_best: found with run.replay, which evaluates nothing",
        ),
        ({"checkpoint": {"keep_best": {"min_delta": -1}}}, "checkpoint.keep_best.min_delta"),
        ({"checkpoint": {"keep_best": {"patience": 0}}}, "checkpoint.keep_best.patience"),
        ({"checkpoint": {"keep_best": {"figures": 1}}}, "did you mean `figure`"),
        ({"run": {"max_minutes": 0}}, "run.max_minutes"),
    ],
)
def test_settings_that_cannot_be_are_refused(sections, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_from_dict({"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 9}} | sections)
