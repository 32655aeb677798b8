"""Rows of data, wherever they are: a task, a JSONL or parquet file, a `datasets` folder or hub id.

A row is known by its file and number (from 1), so that whatever is refused later can be found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.errors import ConfigError, first_line

_OTHER_FORMS = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")

Text = str | list[int]
"""Text, or the token ids that it stands for."""
Conversation = tuple[Mapping[str, str], ...]
"""Chat messages: `role`, `content`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, checked for types but not yet tokenized."""

    name: str
    prompt: Text | Conversation
    response: Text | None = None
    domain: str | None = None
    max_new_tokens: int | None = None


def read_rows(data: DataConfig, seed: int) -> Iterator[Row]:
    """Rows in the order of the data; endless for a task.

    Raises:
        ConfigError: no such data, a broken line, a missing column, a value of a wrong type.
    """
    if data.task is not None:
        for number, problem in enumerate(problems(get_task(data.task), "train", seed)):
            yield Row(f"{data.task}/{number}", problem.prompt, problem.solution, problem.task or data.task)
        return
    for name, record in read_records(data):
        yield _row(name, record, data)


def read_records(data: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`file:number`, columns) of each row of `data.path`.

    Raises:
        ConfigError: no such data, or a broken line.
    """
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
    """Parquet, a folder of `datasets.save_to_disk`, or a hub id, all as an Arrow table that stays on disk."""
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
        elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(file)) or file.suffix in _OTHER_FORMS:
            raise ConfigError(f"data.path: {file} is no .jsonl or .parquet file, no folder, and no hub id")
        else:
            table = datasets.load_dataset(str(file), data.subset, split=data.split)
    except ConfigError:
        raise
    except Exception as error:  # whatever a data file or the hub can do wrong, the user reads one line
        reason = first_line(error)
        raise ConfigError(f"data.path: {file} could not be read as a data set: {reason}") from error
    yield from enumerate(table, start=1)


def _split(table: Any, data: DataConfig) -> Any:
    if data.split not in table:
        raise ConfigError(f"data.split: found {data.split!r}; {data.path} has: {', '.join(table)}")
    return table[data.split]


def _row(name: str, record: Mapping[str, Any], data: DataConfig) -> Row:
    def column(field: str, where: str) -> Any:
        if record.get(field) is None:
            raise ConfigError(f"data.{where}: {name} has no `{field}`; found: {', '.join(record)}")
        return record[field]

    prompt = column(data.prompt_field, "prompt_field")
    if _is_messages(prompt):
        if not data.chat_template:
            raise ConfigError(
                f"data.chat_template: {name}: `{data.prompt_field}` holds chat messages; set data.chat_template to true"
            )
        if prompt[-1]["role"] == "assistant":
            raise ConfigError(
                f"data.prompt_field: {name}: the conversation ends with the assistant's answer; leave that to "
                "data.response_field"
            )
        if data.system_prompt is not None and prompt[0]["role"] == "system":
            raise ConfigError(f"data.system_prompt: {name} brings a system message of its own; give one or the other")
        prompt = tuple(prompt)
    elif not _is_text(prompt):
        raise ConfigError(
            f"data.prompt_field: {name}: `{data.prompt_field}` is neither text, nor token ids, nor chat messages"
        )
    response = column(data.response_field, "response_field") if data.response_field else None
    if response is not None and not _is_text(response):
        raise ConfigError(f"data.response_field: {name}: `{data.response_field}` is neither text nor token ids")
    limit = record.get(data.max_new_tokens_field)
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise ConfigError(f"data.max_new_tokens_field: {name}: found {limit!r}; expected a number of tokens")
    return Row(name, prompt, response, record.get(data.domain_field), limit)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))


def _is_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
