"""docs/troubleshooting.md quotes messages as the code prints them. `pytest tests/docs/test_messages.py`

Most of each message must be text of strings in the source, in which any text may stand for what is filled in.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, blocks
from tests.package.source_files import code_files

_SHORTEST = 12
"""Characters that a string must have besides what is filled in: shorter ones fit by chance."""
_SHARE = 0.5
"""Of a message, that strings of the source must cover; the rest may be filled in at its beginning and end."""

MESSAGES = [
    line.removeprefix("opdlm: ")
    for block in blocks(DOCS / "troubleshooting.md")
    if block.info == "text"
    for line in block.code.splitlines()
]


def strings(file: Path) -> Iterator[list[str | None]]:
    """The strings of a source file in parts; None stands for what is filled in."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.split(r"%[sdg]", node.value)


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    found = []
    for file in code_files():
        for parts in strings(file):
            if sum(len(part) for part in parts if part) >= _SHORTEST:
                found.append(re.compile(".*?".join(re.escape(part or "") for part in parts)))
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_prints_it(message, patterns) -> None:
    covered = {place for pattern in patterns if (found := pattern.search(message)) for place in range(*found.span())}
    assert len(covered) >= _SHARE * len(message), f"the source prints no such message: {message}"


def test_there_are_messages() -> None:
    assert len(MESSAGES) >= 40
