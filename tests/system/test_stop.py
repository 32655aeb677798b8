"""Signals to a real run. `pytest tests/system/test_stop.py`"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opdlm.common.config import dump_config
from tests import REPOSITORY
from tests.patience import PATIENCE
from tests.system.runs import run_config, wait_for_rounds

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAILS_AT_EXIT = """
import atexit, os
atexit.register(os._exit, 1)
from opdlm.deploy.cli import app
app()
"""
"""The command, with an end at exit as Ray's C++ code has it at times while a thread is in one of its calls."""


def test_a_second_ctrl_c_ends_quietly(ray_cluster, victims, chain_teacher, tmp_path) -> None:
    """The learner hangs, so the first one cannot end the run."""
    config = run_config(chain_teacher, tmp_path / "run", run={"rounds": 1000}, learner={"workers": 1})
    file, log = tmp_path / "run.yaml", tmp_path / "errors.txt"
    file.write_text(dump_config(config))
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", FAILS_AT_EXIT, "train", str(file)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        try:
            wait_for_rounds(Path(config.run.dir), 1, process)
            victims.find("learner").suspend()
            process.send_signal(signal.SIGINT)
            told = next(line for line in process.stdout if line.startswith("Ctrl-C: "))
            time.sleep(2)  # what comes within a second counts as the first signal's echo
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()
    assert " of 1000 is finished if its training has begun, then a checkpoint is written; a second one ends" in told
    lines = [line for line in log.read_text().splitlines() if "token authentication is off" not in line]
    assert lines == ["opdlm: Ctrl-C: ended at once; --resume goes on from the last checkpoint"]
    assert process.returncode == 130
