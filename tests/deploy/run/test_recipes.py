"""Run files that come with the package are found by name, in any folder.

`pytest tests/deploy/run/test_recipes.py`
"""

from __future__ import annotations

from pathlib import Path

import pytest

from opdlm.common.config import load_config
from opdlm.common.errors import ConfigError
from opdlm.deploy.run.recipes import find_run_file, read_recipe, recipes
from tests import REPOSITORY


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory that holds no run file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_run_files_are_listed_with_what_they_are_for() -> None:
    listed = recipes()
    assert set(listed) == {file.stem for file in (REPOSITORY / "deploy").glob("*.yaml")} - {"serve"}
    assert all(len(purpose) > 10 for purpose in listed.values()), listed
    assert listed["demo"].startswith("The whole loop on two cores")


def test_a_printed_run_file_loads(elsewhere) -> None:
    (elsewhere / "mine.yaml").write_text(read_recipe("one-gpu"))
    assert load_config("mine.yaml") == load_config(REPOSITORY / "deploy" / "one-gpu.yaml")
    assert read_recipe("one-gpu.yaml") == read_recipe("one-gpu")


@pytest.mark.parametrize("given", ["demo", "demo.yaml", "deploy/demo.yaml"])
def test_a_bundled_file_is_found_by_name(given) -> None:
    assert find_run_file(Path(given)).read_text() == (REPOSITORY / "deploy" / "demo.yaml").read_text()


def test_a_file_of_the_working_directory_wins(elsewhere) -> None:
    (elsewhere / "demo.yaml").write_text("{}")
    assert find_run_file(Path("demo.yaml")) == Path("demo.yaml")


@pytest.mark.parametrize("given", ["none.yaml", "mine/demo.yaml", "/deploy/demo.yaml", "deploy/cluster_files/slurm.sh"])
def test_another_path_is_an_error(given) -> None:
    with pytest.raises(ConfigError, match=rf"^run file: {given} does not exist; .*opdlm recipes"):
        find_run_file(Path(given))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^recipe: found 'dmeo'; known: demo, "):
        read_recipe("dmeo")
