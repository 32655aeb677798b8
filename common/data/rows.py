"""Reads rows of data: prompts from a built-in task, a JSONL or parquet file, a `datasets` folder or a hub id.

Each row is named `file:number`, counted from 1, so that an error or a refusal can say which row it means.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.errors import ConfigError, first_line

_UNSUPPORTED_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")
"""Endings of data files that are not read; a name with one of them is not taken for a hub id."""

Text = str | list[int]
"""Text, or its token ids."""
Conversation = tuple[Mapping[str, str], ...]
"""Chat messages; each has `role` and `content`."""


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


@dataclass(frozen=True, slots=True)
class Question:
    """One row to evaluate on: a prompt and its reference answer, both text."""

    name: str
    """`file:number`."""
    prompt: str
    answer: str


def read_rows(data: DataConfig, seed: int) -> Iterator[Row]:
    """Yields the rows to train on, in the order of the data. A task yields rows without end.

    Args:
        seed: seed of a task's problems.

    Raises:
        ConfigError: the data does not exist, a line is broken, a column is missing, or a value has a wrong type.
    """
    if data.task is not None:
        for number, problem in enumerate(problems(get_task(data.task), "train", seed)):
            yield Row(f"{data.task}/{number}", problem.prompt, problem.solution, problem.task or data.task)
        return
    for name, record in _records(data):
        yield _row(name, record, data)


def read_questions(data: DataConfig) -> Iterator[Question]:
    """Yields the rows of `data.path` as questions, in their order; `data.response_field` names the reference answer.

    A reference answer may be a number, whose text is taken. No other column is read.

    Raises:
        ConfigError: the data does not exist, a line is broken, a column is missing, or a value has a wrong type.
    """
    for name, record in _records(data):
        prompt = _column(name, record, data.prompt_field, "data.prompt_field")
        if not isinstance(prompt, str):
            raise _wrong_type("data.prompt_field", name, data.prompt_field, prompt, "text")
        answer_field = str(data.response_field)
        answer = _column(name, record, answer_field, "data.response_field")
        if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
            raise _wrong_type("data.response_field", name, answer_field, answer, "text or a number")
        yield Question(name, prompt, str(answer))


def _records(data: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (`file:number`, columns) for each row of `data.path`."""
    file = Path(str(data.path))
    for number, record in _jsonl(file) if file.suffix == ".jsonl" else _table(data, file):
        yield f"{file.name}:{number}", record


def _jsonl(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not file.is_file():
        raise ConfigError(f"data.path: {file} does not exist; expected a JSONL file of prompts")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:  # not UTF-8, or not JSON
                    raise ConfigError(f"data.path: {file.name}:{number} is not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise ConfigError(
                        f"data.path: {file.name}:{number} holds a {type(record).__name__}; expected an object"
                    )
                yield number, record


def _table(data: DataConfig, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Reads a parquet file, a folder of `datasets.save_to_disk` or a hub id, as an Arrow table that stays on disk."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if file.suffix == ".parquet":
            if not file.is_file():
                raise ConfigError(f"data.path: {file} does not exist; expected a parquet file of prompts")
            table = datasets.Dataset.from_parquet(str(file))
        elif file.is_dir():
            table = datasets.load_from_disk(str(file))
            if isinstance(table, datasets.DatasetDict):
                table = _split(table, data)
        elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(file)) or file.suffix in _UNSUPPORTED_SUFFIXES:
            raise ConfigError(f"data.path: found {file}; expected a .jsonl or .parquet file, a folder, or a hub id")
        else:
            table = datasets.load_dataset(str(file), data.subset, split=data.split)
    except ConfigError:
        raise
    except Exception as error:  # `datasets` and the hub raise errors of many classes; the user gets one line
        reason = first_line(error)
        raise ConfigError(f"data.path: {file} could not be read as a data set: {reason}") from error
    yield from enumerate(table, start=1)


def _split(table: Any, data: DataConfig) -> Any:
    if data.split not in table:
        raise ConfigError(f"data.split: found {data.split!r}; {data.path} has: {', '.join(table)}")
    return table[data.split]


def _row(name: str, record: Mapping[str, Any], data: DataConfig) -> Row:
    prompt = _column(name, record, data.prompt_field, "data.prompt_field")
    if _is_messages(prompt):
        _check_conversation(name, prompt, data)
        prompt = tuple(prompt)
    elif not _is_text(prompt):
        expected = "text, token ids or chat messages"
        raise _wrong_type("data.prompt_field", name, data.prompt_field, prompt, expected)
    response = None
    if data.response_field:
        response = _column(name, record, data.response_field, "data.response_field")
        if not _is_text(response):
            raise _wrong_type("data.response_field", name, data.response_field, response, "text or token ids")
    limit = record.get(data.max_new_tokens_field)
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise ConfigError(f"data.max_new_tokens_field: {name}: found {limit!r}; expected a number of tokens")
    return Row(name, prompt, response, record.get(data.domain_field), limit)


def _column(name: str, record: Mapping[str, Any], field: str, setting: str) -> Any:
    if field not in record:
        raise ConfigError(f"{setting}: {name} has no `{field}`; found: {', '.join(record)}")
    return record[field]


def _wrong_type(setting: str, name: str, field: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{setting}: {name}: `{field}` is {reprlib.repr(value)}; expected {expected}")


def _check_conversation(name: str, messages: list[dict[str, str]], data: DataConfig) -> None:
    if not data.chat_template:
        raise ConfigError(
            f"data.chat_template: {name}: `{data.prompt_field}` holds chat messages; set data.chat_template to true"
        )
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"data.prompt_field: {name}: the conversation ends with the assistant's answer; end it with the user's "
            "message and put the answer into data.response_field"
        )
    if data.system_prompt is not None and messages[0]["role"] == "system":
        raise ConfigError(
            f"data.system_prompt: {name}: the conversation has a system message of its own; give one or the other"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))


def _is_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
