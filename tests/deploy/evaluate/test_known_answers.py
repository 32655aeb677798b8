"""Questions with accepted answers: choice, marks by kind, and the bundled file.

`pytest tests/deploy/evaluate/test_known_answers.py`
"""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import contains_check
from opdlm.common.data.prompt_sets.held_out import HELD_OUT_KINDS, is_held_out
from opdlm.common.data.rows import Question, read_questions
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.deploy.evaluate.exam import Exam, load_known
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.evaluate.known_answers import KnownAnswers, bundled_questions, choose_evenly, find_questions

TOKENIZER = build_char_tokenizer("0123456789+-=; ")
EOS = TOKENIZER.eos_token_id


def ids(text: str, end: bool = True) -> np.ndarray:
    return np.array(TOKENIZER(text)["input_ids"] + ([EOS] if end else []), dtype=np.int32)


def known(rows: list[tuple[str, tuple[str, ...], str | None]], mark: str = "contains") -> KnownAnswers:
    questions = [
        Question(f"d.jsonl:{i}", prompt, answers, None, kind) for i, (prompt, answers, kind) in enumerate(rows)
    ]
    prompts = [ids(prompt, end=False) for prompt, *_ in rows]
    return KnownAnswers(questions, prompts, mark, lambda r: TOKENIZER.decode(r, skip_special_tokens=True), [EOS])


def test_the_choice_is_even_over_kinds_and_always_the_same() -> None:
    kinds = ["a"] * 50 + ["b"] * 50 + ["c"] * 3 + [None] * 50
    places = choose_evenly(kinds, 23)
    assert places == sorted(set(places)) == choose_evenly(kinds, 23)
    assert Counter(kinds[i] for i in places) == {"a": 7, "b": 7, "c": 3, None: 6}
    assert set(places) < set(choose_evenly(kinds, 24))
    assert choose_evenly(kinds, 1000) == list(range(153))
    assert choose_evenly(["a"] * 100, 10) != list(range(10))


def test_marks_by_kind() -> None:
    asked = known(
        [("1+1=", ("2", "3"), "sum"), ("2+2=", ("4",), "sum"), ("9-1=", ("8",), "rest"), ("1=", ("1",), None)]
    )
    marks = asked.mark([ids("3"), ids("14"), ids("; 8 +"), ids("1")])
    assert marks.right.tolist() == [True, False, True, True]
    assert marks.by_kind == {"sum": {"right": 0.5, "questions": 2}, "rest": {"right": 1.0, "questions": 1}}
    assert [r.index for r in asked.requests(7, first=5)] == [5, 6, 7, 8]
    assert len(asked.chosen(2)) == 2
    assert asked.chosen(None) is asked


def test_a_row_that_cannot_be_marked_is_named() -> None:
    with pytest.raises(OpdlmError, match=r"evaluation.mark contains: d.jsonl:1: found '\?', which has no word"):
        known([("1", ("1",), None), ("2", ("?",), None)])


def test_an_exam_asks_problems_and_questions_together() -> None:
    problems = HeldOutProblems([get_task("add")], TOKENIZER, 3)
    asked = known([("1+1=", ("2",), "sum"), ("2+2=", ("4",), "sum")])
    exam = Exam(problems, asked)
    requests = exam.requests(9)
    assert [r.index for r in requests] == list(range(5))
    assert all((r.prompt_ids == p).all() for r, p in zip(requests, exam.prompt_ids, strict=True))
    right = [ids(problem.solution) for _, problem in problems.problems]
    responses = [right[0], ids("0"), ids(""), ids("2"), ids("5")]
    result = exam.result(responses, [1, 2, 1, 2, 2], 2.0)
    assert (result.problems, result.exact_match, result.data_right) == (5, 0.4, 0.5)
    assert result.by_task["add"]["exact_match"] == pytest.approx(1 / 3)
    assert result.by_kind == {"sum": {"right": 0.5, "questions": 2}}
    tokens = sum(map(len, responses))
    assert (result.tokens_per_step, result.tokens_per_second) == (tokens / 8, tokens / 2)
    assert exam.of_known(responses) == responses[3:]
    assert Exam(problems, None).result(responses[:3], [1, 1, 1], 1.0) == problems.result(responses[:3], [1, 1, 1], 1.0)


def run_config(file: str, **evaluation):
    data = {"path": "prompts.jsonl"}
    return config_from_dict({"model": {"teacher": "t"}, "data": data, "evaluation": {"data": file, **evaluation}})


def test_questions_of_a_run(tmp_path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [
        {"prompt": "1+2=", "answers": ["3"], "kind": "sum"},
        {"prompt": "  ", "answers": ["3"]},
        {"prompt": "1" * 30, "answers": ["3"]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, note = load_known(run_config(str(file), mark="contains"), TOKENIZER, 20, [EOS])
    assert len(asked) == 1
    assert note == (
        "evaluation.data: 2 of 3 questions are refused: q.jsonl:2: the prompt is empty; q.jsonl:3: 30 tokens; expected "
        "1 to 20"
    )
    after_its_end = np.concatenate([ids("5"), ids("3")])  # decoded in the last block, but no part of the answer
    assert asked.mark([after_its_end]).right.tolist() == [False]
    with pytest.raises(OpdlmError, match=r"evaluation.data: 3 of 3 questions are refused: "):
        load_known(run_config(str(file)), TOKENIZER, 2, [EOS])


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("{", {}, "evaluation.data: q.jsonl:1 is not JSON"),
        ("", {}, r"evaluation.data: .*q.jsonl has no rows"),
        ('{"question": "1"}', {}, "evaluation.prompt_field: q.jsonl:1 has no `prompt`; found: question"),
        ('{"prompt": "1"}', {}, "evaluation.answer_field: q.jsonl:1 has no `answer`; found: prompt"),
        (
            '{"prompt": "1", "answer": "1"}',
            {"answer_field": "gold"},
            "evaluation.answer_field: q.jsonl:1 has no `gold`",
        ),
        ('{"prompt": "1", "answer": "!"}', {"mark": "contains"}, "evaluation.mark contains: q.jsonl:1: found '!'"),
        (
            '{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}',
            {},
            "evaluation.chat_template: q.jsonl:1: `prompt` holds chat messages; set evaluation.chat_template to true",
        ),
        (
            '{"prompt": "1", "answer": "1"}',
            {"chat_template": True},
            "evaluation.chat_template: the tokenizer has no chat template .* or set evaluation.chat_template to false",
        ),
    ],
)
def test_mistakes_name_setting_file_and_row(tmp_path, line, settings, message) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(OpdlmError, match=message):
        load_known(run_config(str(tmp_path / "q.jsonl"), **settings), TOKENIZER, 20, [EOS])


def test_a_setting_without_questions_is_refused() -> None:
    for field, value in {"mark": "math", "limit": 3, "chat_template": True, "answer_field": "x"}.items():
        with pytest.raises(
            OpdlmError, match=f"evaluation.{field}: found {value!r} without evaluation.data; name a file"
        ):
            run_config(None, **{field: value})


# --- the bundled file -------------------------------------------------------------------------------------------------

KNOWLEDGE = bundled_questions()["knowledge"]
ROWS = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()]


def test_bundled_questions_are_found_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_questions("knowledge") == KNOWLEDGE
    (tmp_path / "knowledge").write_text("")
    assert find_questions("knowledge") != KNOWLEDGE
    assert find_questions("other.jsonl").name == "other.jsonl"


def test_knowledge_has_enough_questions_of_every_kind() -> None:
    kinds = Counter(q.kind for q in read_questions(DataConfig(path=str(KNOWLEDGE))))
    assert sum(kinds.values()) >= 400
    assert len(kinds) >= 6
    assert min(kinds.values()) >= 60
    assert sum(kinds[kind] for kind in HELD_OUT_KINDS) >= 100
    assert len({row["prompt"] for row in ROWS}) == len(ROWS)
    assert len({row["key"] for row in ROWS}) == len(ROWS)


def test_no_knowledge_question_is_a_training_prompt() -> None:
    for row in ROWS:
        assert row["kind"] in HELD_OUT_KINDS or is_held_out(row["key"]), row


def test_no_knowledge_question_gives_its_answer_away() -> None:
    for row in ROWS:
        for answer in row["answers"]:
            assert contains_check(answer)(f"It is {answer}.")
            assert not contains_check(answer)(row["prompt"]), row


def test_sums_of_knowledge_are_right() -> None:
    for row in (row for row in ROWS if row["kind"] == "arithmetic"):
        sign = next(sign for sign in "+-*" if sign in row["key"])
        left, right = map(int, row["key"].split(sign))
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        assert row["answers"][0] == str(value)
        word = {"+": "plus", "-": "minus", "*": "times"}[sign]
        assert row["prompt"] == f"What is {left} {word} {right}?"


def test_no_built_in_prompt_is_a_knowledge_question() -> None:
    everyday = pytest.importorskip("opdlm.common.data.prompt_sets.everyday", exc_type=ImportError)
    prompts = {_plain(row["prompt"]) for row in everyday.everyday_prompts(0)}
    assert not prompts & {_plain(row["prompt"]) for row in ROWS}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
