"""Re-ranking cases of one's own: rows with the columns `history`, `candidates` and `target` (METHOD.md section 10).

    {"history": ["Rose balm", "Hand cream"], "candidates": [{"id": "b17", "text": "Lip balm"}, "c03"], "target": "c03"}

An entry of `history` or `candidates` is a text, or an object with `id` and `text`, of which the prompt shows both.
Candidates are in the retriever's order, and each has an id of its own. A row may bring its own prompt in the prompt's
column; then `history` is not needed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from opdlm.common.data.reranking import ANSWER_MARK, SEPARATOR, RerankCase
from opdlm.common.errors import ConfigError
from opdlm.common.text import text_fault

CASE_FIELDS = ("history", "candidates", "target")
"""The columns of a case."""
_LEAST_CANDIDATES = 2


def is_case(record: Mapping[str, Any]) -> bool:
    """Whether a row is a re-ranking case: it has candidates and a target."""
    return all(record.get(field) is not None for field in CASE_FIELDS[1:])


def case_of(name: str, record: Mapping[str, Any]) -> RerankCase:
    """The case of a row.

    Args:
        name: `file:number`, for errors.

    Raises:
        ConfigError: candidates or target are missing, of a wrong type, or do not go together; the row is named.
    """
    ids = tuple(entry_id for entry_id, _ in _entries(name, record, "candidates"))
    if len(ids) < _LEAST_CANDIDATES or len(set(ids)) < len(ids):
        found = f"{len(ids)} candidates, {len(set(ids))} of them different"
        raise ConfigError(f"data.path: {name}: found {found}; expected at least {_LEAST_CANDIDATES}, each once")
    for entry_id in ids:
        if entry_id != entry_id.strip() or not entry_id or SEPARATOR in entry_id or ANSWER_MARK in entry_id:
            raise ConfigError(
                f"data.path: {name}: the id {entry_id!r} cannot be read back from an answer; expected no "
                f"`{SEPARATOR}`, no `{ANSWER_MARK}` and no white space at its ends"
            )
    target = record.get("target")
    if target not in ids:
        raise ConfigError(
            f"data.path: {name}: `target` is {reprlib.repr(target)}, which is none of the candidates; leave out cases "
            "whose target was not retrieved"
        )
    return RerankCase(ids, str(target))


def case_prompt(name: str, record: Mapping[str, Any]) -> str:
    """The prompt of a row that has none: its history, its candidates, and what is asked.

    Raises:
        ConfigError: see `case_of`; or there is no history.
    """
    history, candidates = (
        "; ".join(" ".join(part for part in entry if part) for entry in _entries(name, record, field))
        for field in CASE_FIELDS[:2]
    )
    return (
        f"History: {history}\nCandidates: {candidates}\nWhich candidate comes next? Reason briefly, then write "
        f"{ANSWER_MARK} and all ids, the likeliest first, with `{SEPARATOR}` between them.\n"
    )


def _entries(name: str, record: Mapping[str, Any], field: str) -> list[tuple[str, str]]:
    """(id, text) of each entry of a list; the text is empty where there is none."""
    value = record.get(field)
    if not isinstance(value, list):
        raise ConfigError(f"data.path: {name}: `{field}` is {reprlib.repr(value)}; expected a list")
    entries = []
    for entry in value:
        pair: tuple[Any, Any] = (entry.get("id"), entry.get("text") or "") if isinstance(entry, dict) else (entry, "")
        if not all(isinstance(part, str) for part in pair) or not pair[0]:
            raise ConfigError(
                f"data.path: {name}: `{field}` holds {reprlib.repr(entry)}; expected text, or an object with `id` and "
                "`text`"
            )
        if fault := text_fault("".join(pair)):
            raise ConfigError(f"data.path: {name}: `{field}` holds {fault}; correct the text")
        entries.append(pair)
    return entries
