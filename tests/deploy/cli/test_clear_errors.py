"""How a command ends that cannot go on. `pytest tests/deploy/cli/test_clear_errors.py`"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import ray  # noqa: F401  (where it is loaded, a process may have to end without Ray's own end)
import typer

from opdlm.common.errors import OpdlmError
from opdlm.deploy.cli.app import clear_errors
from opdlm.deploy.run.stop import LEARNER_THREAD


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The exit codes of processes that would have ended at once."""
    codes: list[int] = []
    for module in ("cluster.process_end", "run.stop"):
        monkeypatch.setattr(f"opdlm.deploy.{module}.end_now", codes.append)
    return codes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(capsys) -> None:
    with pytest.raises(typer.Exit) as stopped, clear_errors():
        Path("/dev/full").write_text("x")
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err == "opdlm: a file cannot be written: No space left on device; make room\n"
    with pytest.raises(FileNotFoundError), clear_errors():
        Path("/no/such/folder/file").write_text("x")


def test_an_error_ends_the_process_at_once_where_the_learner_hangs(capsys, ended) -> None:
    hangs = threading.Event()
    learner = threading.Thread(target=hangs.wait, name=LEARNER_THREAD)
    learner.start()
    try:
        with pytest.raises(typer.Exit), clear_errors():
            raise OpdlmError("learner: it is silent")
    finally:
        hangs.set()
        learner.join()
    assert (ended, capsys.readouterr().err) == ([2], "opdlm: learner: it is silent\n")
    with pytest.raises(typer.Exit), clear_errors():
        raise OpdlmError("learner: it has ended")
    assert ended == [2]


def test_ctrl_c_is_one_line_and_ends_the_process_at_once(capsys, ended) -> None:
    with pytest.raises(typer.Exit) as stopped, clear_errors():
        raise KeyboardInterrupt
    assert (stopped.value.exit_code, capsys.readouterr().err) == (130, "opdlm: Ctrl-C: ended at once\n")
    assert ended == [130]
