"""`make demo`, with programs of the test in place of the real ones. `pytest tests/package/test_makefile.py`"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.patience import PATIENCE

_OPDLM = """#!/bin/sh
case $1 in
    train) mkdir runs/demo && echo run > runs/demo/metrics.jsonl ;;
    pretrain) mkdir -p $2 ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder that has the Makefile and an environment whose commands do nothing; returns its output."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "python3" / "site-packages").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    for name, text in {"opdlm": _OPDLM, "python": "#!/bin/sh\n"}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def run(target: str) -> str:
        done = subprocess.run(
            ["make", target], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return done.stdout

    return run


def test_the_demo_says_its_stages_and_keeps_an_earlier_run(make, tmp_path: Path) -> None:
    first = make("demo")
    stages = ["installing packages", "training the teacher", "training the student"]
    positions = [first.index(stage) for stage in stages]
    assert positions == sorted(positions)
    for number in (1, 2):
        (tmp_path / "runs/demo/metrics.jsonl").write_text(f"run {number}")
        again = make("demo")
        assert f"runs/demo of an earlier time is now runs/demo.{number}" in again
        assert "installing" not in again
        assert (tmp_path / f"runs/demo.{number}/metrics.jsonl").read_text() == f"run {number}"
    assert (tmp_path / "runs/demo/metrics.jsonl").read_text() == "run\n"
