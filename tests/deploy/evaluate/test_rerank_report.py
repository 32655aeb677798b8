"""`opdlm rerank-report` as a user calls it, on random models. `pytest tests/deploy/evaluate/test_rerank_report.py`"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opdlm.common.data.tasks import get_task
from opdlm.common.model.convert import convert_checkpoint
from tests.deploy.cli.test_cli import opdlm
from tests.tiny import save_teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """An AR model with the alphabet of `rerank`, and the student converted from it."""
    folder = tmp_path_factory.mktemp("rerankers")
    teacher = save_teacher(folder / "teacher", alphabet=get_task("rerank").alphabet)
    convert_checkpoint(str(teacher), folder / "student", 4, "response")
    return teacher, folder / "student"


def test_every_model_has_its_quality_and_its_speed(models, tmp_path) -> None:
    teacher, student = models
    sizes = "--threshold", "0.9,0.5", "--batches", "1,4", "--speed-cases", 4, "--problems", 12, "--max-new-tokens", 16
    out, threads = tmp_path / "report.json", torch.get_num_threads()
    of = f"AR={teacher}", f"new={student}"
    text = opdlm("rerank-report", *of, "--task", "rerank", *sizes, "--threads", threads + 1, "--out", out)
    assert json.loads(out.read_text())["threads"] == threads + 1
    assert torch.get_num_threads() == threads, "as many as before"
    assert "retriever" in text
    assert "…" not in text, "no figure is cut off"
    for title in ("its answers", "speed, batch 1", "speed, batch 4"):
        assert title in text
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["threshold"]) for row in rows] == [("AR", None), ("new", 0.9), ("new", 0.5)]
    for row in rows:
        assert len(row["rerank"]["ranks"]) == 12
        assert row["rerank"]["valid"] == 0.0, "a random model writes no order"
        assert list(row["speed"]) == ["1", "4"]
        for speed in row["speed"].values():
            assert speed["tokens_per_second"] > 0
            assert speed["milliseconds_per_request"] > 0
    assert rows[0]["rerank"]["recall@1"] == rows[1]["rerank"]["recall@1"], "an invalid answer is the retriever's order"
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacher=",), "found 'teacher='; expected FOLDER or NAME=FOLDER"),
        (("a={0}", "a={1}"), "found the name 'a' twice"),
        (("a={0}", "--task", "chain"), "the questions are no re-ranking cases"),
        (("a={0}", "--task", "rerank", "--out", "report.txt"), "expected a .json"),
        (("retriever={0}",), "found the name 'retriever'"),
        (("a={0}", "--batches", "8", "--speed-cases", "4"), "--batches: found 8 with --speed-cases 4"),
        (("a={0}", "--actors", "1"), "--actors: found 1"),
    ],
)
def test_mistakes_are_named(models, arguments, message) -> None:
    given = [argument.format(*models) for argument in arguments]
    assert message in opdlm("rerank-report", *given, *([] if "--task" in given else ["--task", "rerank"]), code=2)


def test_an_evaluation_is_compared_with_that_of_another_checkpoint(models, tmp_path) -> None:
    teacher, student = models
    asked = "--task", "rerank", "--problems", 12, "--max-new-tokens", 16
    first = tmp_path / "teacher.json"
    opdlm("eval", teacher, *asked, "--output", first)
    second = tmp_path / "student.json"
    text = opdlm("eval", student, *asked, "--beside", first, "--output", second, "--strategy", "low_confidence_static")
    assert f"{teacher.parent.name}/teacher, autoregressive, greedy" in " ".join(text.split())
    compared = json.loads(second.read_text())["compared"]
    pairs = {(one["order"], one["beside"].rpartition("/")[2]) for one in compared}
    theirs = "teacher, autoregressive, greedy"
    assert pairs == {(f"{teacher.parent.name}/{theirs}", "retriever"), ("static", "retriever"), ("static", theirs)}
    assert {one["metric"] for one in compared} == {"recall@1", "ndcg@3"}
    assert all(one["low"] <= one["difference"] <= one["high"] for one in compared)


def test_what_cannot_be_compared_is_refused(models, tmp_path) -> None:
    teacher, student = models
    other, broken = tmp_path / "other.json", tmp_path / "broken.json"
    asked = "--task", "rerank", "--max-new-tokens", 4
    opdlm("eval", teacher, *asked, "--problems", 3, "--output", other)
    broken.write_text("{}")
    less = tmp_path / "less.json"
    opdlm("eval", teacher, *asked, "--problems", 4, "--output", less)
    changed = json.loads(less.read_text()) | {"cases": "0"}
    less.write_text(json.dumps(changed))
    for file, message in ((other, "has other cases"), (broken, "is no result"), ("x", "x"), (less, "has other cases")):
        assert message in opdlm("eval", student, *asked, "--problems", 4, "--beside", file, code=2)
    assert "only re-ranking cases" in opdlm("eval", student, "--task", "chain", "--beside", other, code=2)
