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
def texts() -> list[list[str | None]]:
    """The strings of the source that are long enough to tell a message by, in parts."""
    found = [parts for file in code_files() for parts in strings(file)]
    return [parts for parts in found if sum(len(part) for part in parts if part) >= _SHORTEST]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_prints_it(message, texts) -> None:
    covered: set[int] = set()
    for parts in texts:
        if all(part in message for part in parts if part):  # first: a pattern that does not fit takes long to fail
            pattern = ".*?".join(re.escape(part or "") for part in parts)
            if found := re.search(pattern, message):
                covered.update(range(*found.span()))
    assert len(covered) >= _SHARE * len(message), f"the source prints no such message: {message}"


def test_there_are_messages() -> None:
    assert len(MESSAGES) >= 40
