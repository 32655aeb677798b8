"""Rows of data with checked values: prompts of a built-in task or of a data set, and questions to evaluate on.

Each row is named `file:number`, counted from 1, so that an error or a refusal can say which row it means.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import ANSWER_KINDS, AnswerKind
from opdlm.common.data.conversation import Conversation, are_messages, read_conversation
from opdlm.common.data.records import read_records
from opdlm.common.data.rerank_rows import CASE_FIELDS, case_of, case_prompt, is_case
from opdlm.common.data.reranking import Reference, RerankCase
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.errors import ConfigError
from opdlm.common.text import text_fault

Text = str | list[int]
"""Text, or its token ids."""
ANSWER_FIELDS = ("answers", "answer")
"""Columns of accepted answers, the first that a row has, where none is named."""
_QUESTION_FIELDS = ("mark", "kind")
"""Columns that a file of questions may have."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row to train on. The types are checked, the text is not yet tokenized."""

    name: str
    """`file:number`, or `task/number`."""
    prompt: Text | Conversation
    response: Text | None = None
    """A given response (`offline.responses: data`), or the solution of a task's problem."""
    domain: str | None = None
    max_new_tokens: int | None = None
    """The row's own limit of its response, in tokens."""
    reference: Reference | None = None
    """What a reward compares responses with: the response as text, or a re-ranking case."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row to evaluate on: a prompt, and the answers that count as right, as text."""

    name: str
    """`file:number`."""
    prompt: str | Conversation
    answers: tuple[str, ...]
    mark: AnswerKind | None = None
    """How the row is marked. None: as the file is."""
    kind: str | None = None
    """The kind of question, which gets figures of its own."""
    case: RerankCase | None = None
    """What a row that is to be re-ranked is measured by; its only accepted answer is the target in the first place."""


def read_rows(data: DataConfig, seed: int) -> Iterator[Row]:
    """Yields the rows to train on, in the order of the data. A task yields rows without end.

    Args:
        seed: seed of a task's problems.

    Raises:
        ConfigError: the data does not exist, a line is broken, a column is missing, or a value has a wrong type.
    """
    if data.task is not None:
        for number, problem in enumerate(problems(get_task(data.task), "train", seed)):
            name, reference = f"{data.task}/{number}", problem.case or problem.solution
            yield Row(name, problem.prompt, problem.solution, problem.task or data.task, reference=reference)
        return
    needed = [data.prompt_field, *([data.response_field] if data.response_field else [])]
    for name, record in read_records(data, needed, [data.domain_field, data.max_new_tokens_field, *CASE_FIELDS]):
        yield _row(name, record, data)


def read_questions(data: DataConfig) -> Iterator[Question]:
    """Yields the rows of `data.path` as questions, in their order.

    The column of answers is `data.response_field`; where that is empty, `answers`, else `answer`. It holds one answer
    or a list of them, each text or a number, whose text is taken. Columns `mark` and `kind` are read where they are
    there, and of re-ranking cases their columns (`rerank_rows.py`); no other one is.

    Raises:
        ConfigError: the data does not exist, a line is broken, a column is missing, or a value has a wrong type.
    """
    named = data.response_field
    needed = [data.prompt_field, *([named] if named else [])]
    optional = [*([] if named else ANSWER_FIELDS), *_QUESTION_FIELDS, *CASE_FIELDS]
    for name, record in read_records(data, needed, optional):
        prompt = _prompt(name, record, data, "text or chat messages")
        if isinstance(prompt, list):
            raise _wrong_type("data.prompt_field", name, data.prompt_field, prompt, "text or chat messages")
        if is_case(record):
            case = case_of(name, record)
            yield Question(name, prompt, (case.target,), kind=_optional_text(name, record, "kind"), case=case)
            continue
        field = named or next((field for field in ANSWER_FIELDS if record.get(field) is not None), ANSWER_FIELDS[-1])
        mark, kind = (_optional_text(name, record, field) for field in _QUESTION_FIELDS)
        if mark is not None and mark not in ANSWER_KINDS:
            raise ConfigError(f"data.path: {name}: `mark` is {mark!r}; expected one of {', '.join(ANSWER_KINDS)}")
        yield Question(name, prompt, _answers(name, record, field), mark, kind)


def _answers(name: str, record: Mapping[str, Any], field: str) -> tuple[str, ...]:
    given = _column(name, record, field, "data.response_field")
    answers = given if isinstance(given, list) and given else [given]
    for answer in answers:
        finite = not isinstance(answer, float) or math.isfinite(answer)
        if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not finite:
            raise _wrong_type("data.response_field", name, field, answer, "text or a number, or a list of them")
        _check_text("data.response_field", name, field, answer)
    return tuple(str(answer) for answer in answers)


def _optional_text(name: str, record: Mapping[str, Any], field: str) -> str | None:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise _wrong_type("data.path", name, field, value, "text, or no value")
    _check_text("data.path", name, field, value)
    return value


def _row(name: str, record: Mapping[str, Any], data: DataConfig) -> Row:
    prompt = _prompt(name, record, data, "text, token ids or chat messages")
    response = None
    if data.response_field:
        response = _column(name, record, data.response_field, "data.response_field")
        if not _is_text(response):
            raise _wrong_type("data.response_field", name, data.response_field, response, "text or token ids")
        _check_text("data.response_field", name, data.response_field, response)
    text = response if isinstance(response, str) else None
    reference = case_of(name, record) if is_case(record) else text
    return Row(name, prompt, response, _domain(name, record, data), _limit(name, record, data), reference)


def _prompt(name: str, record: Mapping[str, Any], data: DataConfig, expected: str) -> Text | Conversation:
    if data.prompt_field not in record and is_case(record):
        return case_prompt(name, record)
    prompt = _column(name, record, data.prompt_field, "data.prompt_field")
    if are_messages(prompt):
        try:
            messages = read_conversation(prompt)
        except ValueError as error:
            raise ConfigError(f"data.prompt_field: {name}: {error}") from None
        _check_conversation(name, messages, data)
        return messages
    if not _is_text(prompt):
        raise _wrong_type("data.prompt_field", name, data.prompt_field, prompt, expected)
    _check_text("data.prompt_field", name, data.prompt_field, prompt)
    return prompt


def _domain(name: str, record: Mapping[str, Any], data: DataConfig) -> str | None:
    domain = record.get(data.domain_field)
    if domain is not None and not isinstance(domain, str):
        raise _wrong_type("data.domain_field", name, data.domain_field, domain, "text, or no value")
    _check_text("data.domain_field", name, data.domain_field, domain)
    return domain


def _limit(name: str, record: Mapping[str, Any], data: DataConfig) -> int | None:
    limit = record.get(data.max_new_tokens_field)
    if isinstance(limit, float) and limit.is_integer():  # a column with empty places, as pandas writes it
        limit = int(limit)
    if limit is not None and not (type(limit) is int and limit > 0):
        found = reprlib.repr(limit)
        raise ConfigError(f"data.max_new_tokens_field: {name}: found {found}; expected a number of tokens")
    return limit


def _column(name: str, record: Mapping[str, Any], field: str, setting: str) -> Any:
    if field not in record:
        raise ConfigError(f"{setting}: {name} has no `{field}`; found: {', '.join(record)}")
    return record[field]


def _wrong_type(setting: str, name: str, field: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{setting}: {name}: `{field}` is {reprlib.repr(value)}; expected {expected}")


def _check_text(setting: str, name: str, field: str, value: Any) -> None:
    """Raises `ConfigError` for a string that is no text."""
    if isinstance(value, str) and (fault := text_fault(value)):
        raise ConfigError(f"{setting}: {name}: `{field}` holds {fault}; correct the text")


def _check_conversation(name: str, messages: Conversation, data: DataConfig) -> None:
    if not data.chat_template:
        raise ConfigError(
            f"data.chat_template: {name}: `{data.prompt_field}` holds chat messages; set data.chat_template to true"
        )
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"data.prompt_field: {name}: the conversation ends with the assistant's answer; end it with the user's "
            "message and put the answer into data.response_field"
        )
    if not any(message["role"] == "user" for message in messages):
        raise ConfigError(f"data.prompt_field: {name}: the conversation has no message of the user; add one")
    if data.system_prompt is not None and messages[0]["role"] in ("system", "developer"):
        raise ConfigError(
            f"data.system_prompt: {name}: the conversation has a system message of its own; give one or the other"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))
