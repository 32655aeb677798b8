"""A script of the tests in a process that has neither our packages nor a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_isolated(script: Path, job: dict[str, Any], work: Path) -> str:
    """Runs a script to its end and returns what it printed.

    Args:
        job: the script finds it as JSON in the file that its first argument names.
        work: working directory.
    """
    file = work / "job.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(file)],
        cwd=work,
        env=os.environ | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
