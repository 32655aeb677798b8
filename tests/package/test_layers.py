"""What may import what, and how files are named and how long they are. `pytest tests/package/test_layers.py`

The tests read import statements; they do not see imports by `importlib`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import REPOSITORY
from tests.package.source_files import ROOMS, code_files, module_name, python_files_of_tests

MOST_LINES = 300
OLD_NAMES = {
    "coordinator", "exams", "job_paths", "lives", "outbox", "plan_job", "sample_keeper", "sinks", "step_view",
    "telemetry", "threads",
}  # fmt: skip
"""Modules of earlier versions whose names were metaphors or misleading."""


class Import(NamedTuple):
    """One imported module."""

    module: str
    line: int
    when_loaded: bool
    """Whether it is imported when the file is, not later inside a function."""
    only_for_types: bool
    """Whether it stands under `if TYPE_CHECKING:`, so that it never runs."""


@cache
def imports(file: Path) -> tuple[Import, ...]:
    """Every import statement of a file. `from a import b` imports the module `a.b` if there is one, otherwise `a`."""
    found: list[Import] = []

    def visit(node: ast.AST, when_loaded: bool, only_for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, when_loaded, only_for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(file).split(".")[: None if file.name == "__init__.py" else -1]
            start = [*package[: len(package) - node.level + 1], ""] if node.level else []
            origin = (".".join(start) + (node.module or "")).rstrip(".")
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found.extend(
                Import(name if name in known_modules() else origin, node.lineno, when_loaded, only_for_types)
                for name in names
            )
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, when_loaded, True)
            for child in node.orelse:
                visit(child, when_loaded, only_for_types)
        else:
            inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, when_loaded and not inside_function, only_for_types)

    visit(ast.parse(file.read_text()), True, False)
    return tuple(found)


@cache
def known_modules() -> frozenset[str]:
    """Names of all modules of the repository."""
    return frozenset(module_name(file) for file in [*code_files(), *python_files_of_tests()])


def is_in(module: str, package: str) -> bool:
    """Whether a module is the package or lies in it."""
    return f"{module}.".startswith(f"{package}.")


def forbidden(files: list[Path], *packages: str) -> list[str]:
    """`FILE:LINE imports MODULE` for each import in the files of something in these packages, for types or not."""
    return [
        f"{file.relative_to(REPOSITORY)}:{found.line} imports {found.module}"
        for file in files
        for found in imports(file)
        if any(is_in(found.module, package) for package in packages)
    ]


def files_of(room: str) -> list[Path]:
    """The files of one room."""
    return [file for file in code_files() if is_in(module_name(file), f"opdlm.{room}")]


def test_every_file_is_read_once_and_nothing_else() -> None:
    """Links in `opdlm/` do not show a file twice, and no environment or build folder is read."""
    files = code_files()
    assert len({file.resolve() for file in files}) == len(files)
    assert all(len(files_of(room)) > 15 for room in ROOMS)
    assert sum(len(files_of(room)) for room in ROOMS) + len(list((REPOSITORY / "opdlm").glob("*.py"))) == len(files)
    names = {module_name(file) for file in files}
    assert {"opdlm", "opdlm.api", "opdlm.actors.rollout.decoder", "opdlm.common.config", "opdlm.learner.zero"} <= names
    assert {"opdlm.deploy.run.train", "opdlm.deploy.tools.trace.page"} <= names
    assert {file.relative_to(REPOSITORY).parts[0] for file in files} == {*ROOMS, "opdlm"}


def test_imports_are_found_wherever_they_stand() -> None:
    source = REPOSITORY / "opdlm" / "api.py"
    found = {(i.module, i.when_loaded, i.only_for_types) for i in imports(source)}
    assert ("collections.abc", True, False) in found
    assert ("opdlm.common.config", True, True) in found, "under TYPE_CHECKING"
    assert ("opdlm.deploy.run.train", False, False) in found, "inside a function"
    assert ("opdlm.deploy.evaluate.commands", False, False) in found, "a module imported from its package"


def test_rooms_are_imported_as_opdlm_only() -> None:
    """A user's own folder `common/` in the working directory would be imported instead of ours."""
    assert forbidden([*code_files(), *python_files_of_tests()], *ROOMS) == []


def test_common_imports_neither_ray_nor_deepspeed_nor_another_room() -> None:
    others = [f"opdlm.{room}" for room in ROOMS if room != "common"]
    assert forbidden(files_of("common"), "ray", "deepspeed", "opdlm.api", *others) == []


@pytest.mark.parametrize(("room", "other"), [("actors", "learner"), ("learner", "actors")])
def test_actors_and_learner_import_only_common_and_themselves(room, other) -> None:
    assert forbidden(files_of(room), f"opdlm.{other}", "opdlm.deploy", "opdlm.api") == []


def test_only_deploy_and_the_public_functions_import_deploy() -> None:
    may = {"opdlm", "opdlm.__main__", "opdlm.api"}
    others = [f for f in code_files() if module_name(f) not in may and not is_in(module_name(f), "opdlm.deploy")]
    assert forbidden(others, "opdlm.deploy") == []


def test_no_code_imports_tests() -> None:
    assert forbidden(code_files(), "tests") == []


def test_config_and_the_package_itself_load_no_heavy_library() -> None:
    """A mistake in a run file costs a fraction of a second, also on a laptop without torch and Ray."""
    code = (
        "import sys, opdlm; from opdlm.common.config import load_config; load_config(sys.argv[1]);"
        "assert not {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    demo = REPOSITORY / "deploy" / "demo.yaml"
    subprocess.run([sys.executable, "-c", code, str(demo)], check=True, cwd=REPOSITORY)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Counts imports that run when a file is loaded."""
    modules = {module_name(file) for file in code_files()}
    edges = {
        module_name(file): sorted(
            {i.module for i in imports(file) if i.when_loaded and not i.only_for_types and i.module in modules}
        )
        for file in code_files()
    }
    assert sum(map(len, edges.values())) > 300
    assert [" -> ".join(circle) for circle in circles(edges)] == []


def circles(edges: dict[str, list[str]]) -> Iterator[list[str]]:
    """Each path that comes back to its start, found by a depth-first search."""
    done: set[str] = set()

    def follow(path: list[str]) -> Iterator[list[str]]:
        for following in edges[path[-1]]:
            if following in path:
                yield [*path[path.index(following) :], following]
            elif following not in done:
                yield from follow([*path, following])
        done.add(path[-1])

    for start in edges:
        if start not in done:
            yield from follow([start])


def test_circles_are_found() -> None:
    assert list(circles({"a": ["b", "c"], "b": ["c"], "c": []})) == []
    assert list(circles({"a": ["b"], "b": ["c"], "c": ["b"]})) == [["b", "c", "b"]]
    assert list(circles({"a": ["a"]})) == [["a", "a"]]


def test_no_file_is_too_long() -> None:
    lengths = {str(f.relative_to(REPOSITORY)): count_lines(f) for f in [*code_files(), *python_files_of_tests()]}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def count_lines(file: Path) -> int:
    """Number of lines of a file."""
    return len(file.read_text().splitlines())


def test_no_module_has_the_name_of_an_old_one() -> None:
    names = {name for module in known_modules() for name in module.split(".")}
    assert {name for name in names if name.removeprefix("test_") in OLD_NAMES} == set()
