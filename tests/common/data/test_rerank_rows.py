"""Re-ranking cases of one's own, as prompts and as questions. `pytest tests/common/data/test_rerank_rows.py`"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.reranking import RerankCase
from opdlm.common.data.rows import read_questions, read_rows
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.deploy.evaluate.known_answers import KnownAnswers

ROW = {
    "history": ["Rose balm", {"id": "a1", "text": "Hand cream"}],
    "candidates": [{"id": "b17", "text": "Lip balm"}, "c03", "d4"],
    "target": "c03",
}
EOS = 0


def data(folder: Path, *rows: dict) -> DataConfig:
    file = folder / "cases.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(file))


def test_a_case_is_a_prompt_and_what_the_reward_compares_with(tmp_path) -> None:
    (row,) = read_rows(data(tmp_path, ROW), 0)
    assert row.reference == RerankCase(("b17", "c03", "d4"), "c03")
    assert str(row.prompt).startswith("History: Rose balm; a1 Hand cream\nCandidates: b17 Lip balm; c03; d4\n")


def test_a_case_may_bring_its_prompt_and_a_response(tmp_path) -> None:
    of = data(tmp_path, {**ROW, "history": None, "prompt": "Choose:", "response": "so#c03,b17,d4"})
    (row,) = read_rows(of.model_copy(update={"response_field": "response"}), 0)
    assert (row.prompt, row.response) == ("Choose:", "so#c03,b17,d4")
    assert isinstance(row.reference, RerankCase)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "x"}, "cases.jsonl:1: `target` is 'x', which is none of the candidates"),
        ({"candidates": ["c03", "c03"]}, "cases.jsonl:1: found 2 candidates, 1 of them different"),
        ({"candidates": ["c03"]}, "cases.jsonl:1: found 1 candidates"),
        ({"candidates": ["c03", "a,b"]}, "cases.jsonl:1: the id 'a,b' cannot be read back from an answer"),
        ({"candidates": ["c03", {"text": "no id"}]}, "cases.jsonl:1: `candidates` holds {'text': 'no id'}"),
        ({"candidates": "c03"}, "cases.jsonl:1: `candidates` is 'c03'; expected a list"),
        ({"history": None}, "cases.jsonl:1: `history` is None; expected a list"),
        ({"history": ["a\ud800"]}, "cases.jsonl:1: `history` holds "),
    ],
)
def test_a_broken_case_is_named(tmp_path, change, message) -> None:
    with pytest.raises(ConfigError) as error:
        list(read_rows(data(tmp_path, {**ROW, **change}), 0))
    assert message in str(error.value)


def test_answers_to_cases_are_measured_as_orders(tmp_path) -> None:
    """Right, valid with another first, without an end, and with an id outside the list."""
    questions = list(read_questions(data(tmp_path, *[ROW] * 4)))
    texts = ["so#c03,b17,d4", "#b17,c03,d4", "#c03,b17,d4", "#c03,b17,z9"]
    known = KnownAnswers(questions, [np.array([1])] * 4, "exact", lambda ids: texts[ids[0] - 1], [EOS])
    marks = known.mark([np.array(ids) for ids in ([1, EOS], [2, EOS], [3], [4, EOS])])
    assert marks.right.tolist() == [True, False, False, False]
    figures = marks.by_kind["reranking"]
    assert (figures["right"], figures["valid"], figures["too_long"], figures["out_of_set"]) == (0.25, 0.5, 0.25, 0.25)
    assert figures["recall@1"] == 0.25


def test_cases_and_other_questions_do_not_mix(tmp_path) -> None:
    questions = list(read_questions(data(tmp_path, ROW, {"prompt": "1+1=", "answer": "2"})))
    with pytest.raises(OpdlmError, match=r"cases.jsonl:2 is no re-ranking case"):
        KnownAnswers(questions, [np.array([1])] * 2, "exact", str, [EOS])
