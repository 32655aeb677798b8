"""`opdlm rerank-report` as a user calls it, on random models. `pytest tests/deploy/evaluate/test_rerank_report.py`"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    out = tmp_path / "report.json"
    text = opdlm("rerank-report", f"AR={teacher}", f"new={student}", "--task", "rerank", *sizes, "--out", out)
    assert "retriever" in text
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
        (("teacher",), "found 'teacher'; expected NAME=FOLDER"),
        (("a={0}", "a={1}"), "found the name 'a' twice"),
        (("a={0}", "--task", "chain"), "the questions are no re-ranking cases"),
        (("a={0}", "--task", "rerank", "--out", "report.txt"), "expected a .json"),
    ],
)
def test_mistakes_are_named(models, arguments, message) -> None:
    given = [argument.format(*models) for argument in arguments]
    assert message in opdlm("rerank-report", *given, *([] if "--task" in given else ["--task", "rerank"]), code=2)
