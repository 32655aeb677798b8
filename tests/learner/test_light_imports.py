"""What importing modules of the learner loads. `pytest tests/learner/test_light_imports.py`"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import REPOSITORY

HEAVY = "torch", "transformers", "deepspeed", "ray"


@pytest.mark.parametrize("module", ["", ".group", ".setup", ".schedule", ".rollout_files"])
def test_light_modules_load_no_heavy_package(module) -> None:
    """Ray Train's own actors load `group` and `setup`; the tasks that save rollouts load `rollout_files`."""
    code = f"import sys, opdlm.learner{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
