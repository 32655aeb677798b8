"""Another `opdlm` in the way. `pytest tests/deploy/cluster/test_import_name.py`"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import opdlm
from opdlm.common.errors import OpdlmError
from opdlm.deploy.cluster.import_name import check_import_name
from tests import REPOSITORY
from tests.patience import PATIENCE


def other(folder: Path, kind: str) -> Path:
    """Makes another `opdlm` in a folder; returns the file that Python would import."""
    file = folder / ("opdlm.py" if kind == "a file" else "opdlm/__init__.py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise SystemExit('the other opdlm was run')\n")
    return file


def run(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("kind", ["a file", "a package"])
def test_the_workers_would_import_it_from_the_working_directory(tmp_path, monkeypatch, kind) -> None:
    file = other(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpdlmError, match=r"is in the way: the processes of the run would import it") as raised:
        check_import_name()
    assert str(file) in str(raised.value)


def test_the_folder_of_the_script_counts_where_it_is_on_the_path(tmp_path, monkeypatch) -> None:
    other(tmp_path, "a file")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    monkeypatch.chdir(REPOSITORY)
    check_import_name()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OpdlmError, match=r"opdlm\.py is in the way"):
        check_import_name()


@pytest.mark.parametrize("version", [opdlm.__version__, "0.0.1"])
def test_another_checkout_must_have_our_version(tmp_path, monkeypatch, version) -> None:
    (tmp_path / "opdlm" / "deploy" / "cli").mkdir(parents=True)
    (tmp_path / "opdlm" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    monkeypatch.chdir(tmp_path)
    if version == opdlm.__version__:
        check_import_name()
    else:
        with pytest.raises(OpdlmError, match=r"is in the way"):
            check_import_name()


def test_a_folder_that_is_no_package_is_not_in_the_way(tmp_path, monkeypatch) -> None:
    (tmp_path / "opdlm").mkdir()
    monkeypatch.chdir(tmp_path)
    check_import_name()


def test_train_says_it_before_ray_starts(tmp_path, chain_teacher) -> None:
    file = other(tmp_path, "a file")
    (tmp_path / "run.yaml").write_text(
        f"run: {{dir: {tmp_path / 'run'}, rounds: 1}}\nmodel: {{teacher: {chain_teacher}, dtype: float32}}\n"
        "data: {task: chain, prompts: 8}\nrollout: {prompts_per_round: 8, max_new_tokens: 8}\n"
        "teacher: {dtype: float32}\nevaluation: {final_problems: 0}\n"
    )
    done = run("-P", "-m", "opdlm", "train", "run.yaml", cwd=tmp_path, path=[REPOSITORY])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"opdlm: {file} is in the way: ")


@pytest.mark.parametrize("kind", ["a file", "a package", "a folder"])
def test_the_command_says_it_where_it_cannot_be_imported_itself(tmp_path, kind) -> None:
    """As the installed script with a PYTHONPATH that has another `opdlm`. A plain folder is not in the way."""
    command = ("-P", "-c", "from opdlm_command import main; main()", "--version")
    if kind == "a folder":
        (tmp_path / "opdlm").mkdir()
        done = run(*command, cwd=tmp_path, path=[tmp_path, REPOSITORY])
        assert (done.returncode, done.stdout) == (0, f"opdlm {opdlm.__version__}\n"), done.stderr
        return
    file = other(tmp_path, kind)
    done = run(*command, cwd=tmp_path, path=[tmp_path, REPOSITORY])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"opdlm: {file} is in the way: Python finds it under the name opdlm")
