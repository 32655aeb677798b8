"""The pages of the documentation, and their fenced and inline code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "SECURITY.md", *sorted(DOCS.glob("*.md"))]

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    info: str
    """What follows the opening fence: `python`, `yaml`, or nothing."""
    code: str
    line: int
    """Of its first line of code in the page, from 1."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(found["info"].strip(), found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """What a page has between single backticks."""
    return _INLINE.findall(prose(page))


def without_code(page: Path) -> str:
    """A page without fenced and inline code."""
    return _INLINE.sub("", prose(page))
