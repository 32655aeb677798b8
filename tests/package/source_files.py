"""The Python files of the repository, for tests that read source code."""

from __future__ import annotations

from pathlib import Path

from tests import REPOSITORY

ROOMS = ("common", "actors", "learner", "deploy")


def code_files() -> list[Path]:
    """Every file of the package `opdlm`, once: the four rooms, and the files of `opdlm/` itself.

    `opdlm/` also holds links to the rooms. The rooms are read at the top of the repository, so no link is followed.
    """
    rooms = [file for room in ROOMS for file in sorted((REPOSITORY / room).rglob("*.py"))]
    return [*rooms, *sorted((REPOSITORY / "opdlm").glob("*.py"))]


def python_files_of_tests() -> list[Path]:
    """Every Python file of `tests/`."""
    return sorted((REPOSITORY / "tests").rglob("*.py"))


def module_name(file: Path) -> str:
    """The name by which a file is imported: `common/config/load.py` is `opdlm.common.config.load`."""
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] in ("opdlm", "tests") else ("opdlm", *parts))
