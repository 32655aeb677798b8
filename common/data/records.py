"""Reads the rows of data files as plain records: JSONL, parquet, a folder that `datasets` saved, or a hub id.

A row is named `file:number`, counted from 1. Files are read anew each time. No cache lies between, so a file that was
replaced by another one of the same name, size and time gives the other one's rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlm.common.config.schema import DataConfig
from opdlm.common.errors import ConfigError, first_line

_UNSUPPORTED_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")
"""Endings of data files that are not read; a name with one of them is not taken for a hub id."""
Columns = tuple[Sequence[str], Sequence[str]]
"""Names of the needed columns, and of the optional ones."""
_BATCH_ROWS = 1000
"""Rows of a table that are in memory at the same time."""


def read_records(
    data: DataConfig, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (`file:number`, record) for each row of `data.path`.

    Args:
        needed: columns that the caller needs. Of a table that has them all, only these and the optional ones are read.
        optional: columns that the caller reads where they are there.

    Raises:
        ConfigError: the data does not exist or cannot be read, or a row is broken; its text says which one.
    """
    file = Path(str(data.path))
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl(file)
    else:
        yield from _table(data, file, suffix, (needed, optional))


def require_file(file: Path, setting: str, expected: str) -> None:
    """Raises `ConfigError` where there is no file that can be read several times, as a pipe cannot."""
    try:
        if file.is_file():
            return
        other = "is no regular file" if file.exists() else "does not exist"
        found = "is a folder" if file.is_dir() else other
    except OSError as error:  # a name that is too long, say
        found = f"cannot be read ({error.strerror})"
    raise ConfigError(f"{setting}: {file} {found}; expected {expected}")


def _jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    require_file(file, "data.path", "a JSONL file of prompts")
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                name = f"{file.name}:{number}"
                text = _decoded(name, line, first=number == 1)
                if text.strip():
                    yield name, _record(name, text)
    except OSError as error:
        raise ConfigError(f"data.path: {file} cannot be read: {error.strerror or error}") from None


def _decoded(name: str, line: bytes, first: bool) -> str:
    """A line as text. The first one may begin with a byte-order mark, which editors on Windows write."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.path: {name} is not JSON: byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is no "
            "UTF-8; save the file as UTF-8"
        ) from None


def _record(name: str, text: str) -> Mapping[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ConfigError(f"data.path: {name} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        long_number = "integer string conversion" in str(error)
        reason = "a number has more than 4,300 digits" if long_number else str(error)
        raise ConfigError(f"data.path: {name} is not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"data.path: {name} holds a {type(record).__name__}; expected an object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Python would keep the last value of a key that is there twice, and drop the others."""
    held = dict(pairs)
    if len(held) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return held


def _table(data: DataConfig, file: Path, suffix: str, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        first = 1
        for batch in _parquet(file, columns) if suffix == ".parquet" else _data_set(data, file, suffix, columns):
            for place, record in enumerate(_plain(file.name, first, batch)):
                yield f"{file.name}:{first + place}", record
            first += batch.num_rows
    except ConfigError:
        raise
    except Exception as error:  # Arrow, `datasets` and the hub raise errors of many classes; the user gets one line
        reason = first_line(error)
        raise ConfigError(f"data.path: {file} could not be read as a data set: {reason}") from error


def _parquet(file: Path, columns: Columns) -> Iterator[Any]:
    """Record batches of a parquet file. (`datasets` would keep a copy by path and time, not by content.)"""
    import pyarrow.parquet as pq

    require_file(file, "data.path", "a parquet file of prompts")
    with pq.ParquetFile(file) as table:
        yield from table.iter_batches(_BATCH_ROWS, columns=_chosen(table.schema_arrow.names, columns))


def _data_set(data: DataConfig, file: Path, suffix: str, columns: Columns) -> Iterator[Any]:
    """Arrow tables of a folder that `datasets` saved, or of a data set on the hub; they stay on disk."""
    import datasets

    datasets.disable_progress_bars()
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(file)) and suffix not in _UNSUPPORTED_SUFFIXES
    if file.is_dir():
        table = datasets.load_from_disk(str(file))
        if isinstance(table, datasets.DatasetDict):
            table = _split(table, data)
    elif file.exists() or not is_hub_id:
        raise ConfigError(f"data.path: found {file}; expected a .jsonl or .parquet file, a folder, or a hub id")
    else:
        table = datasets.load_dataset(str(file), data.subset, split=data.split)
    chosen = _chosen(table.column_names, columns)
    for batch in table.with_format("arrow").iter(_BATCH_ROWS):
        yield batch if chosen is None else batch.select(chosen)


def _split(table: Any, data: DataConfig) -> Any:
    if data.split not in table:
        raise ConfigError(f"data.split: found {data.split!r}; {data.path} has: {', '.join(table)}")
    return table[data.split]


def _chosen(held: Sequence[str], columns: Columns) -> list[str] | None:
    """The columns of a table that are read. None, all of them, where a needed one is missing: the error lists them."""
    needed, optional = columns
    return [name for name in held if name in (*needed, *optional)] if set(needed) <= set(held) else None


def _plain(file: str, first: int, batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch as Python values. Arrow does not check its text: a row that is no UTF-8 is named."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            try:
                batch.slice(place, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise ConfigError(f"data.path: {file}:{first + place} holds text that is no UTF-8: {error}") from None
        raise
