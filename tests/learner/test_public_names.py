"""The names that the package exports, and what importing it loads. `pytest tests/learner/test_public_names.py`"""

from __future__ import annotations

import subprocess
import sys

import pytest

from opdlm import learner
from tests import REPOSITORY

HEAVY = "torch", "transformers", "deepspeed", "ray"


def test_every_public_name_can_be_imported() -> None:
    for name in learner.__all__:
        module = getattr(getattr(learner, name), "__module__", "opdlm.learner.states")  # SELECTIONS, a dictionary
        assert module.startswith("opdlm.learner."), name
    with pytest.raises(AttributeError, match=r"module 'opdlm.learner' has no attribute 'Student'"):
        learner.Student  # noqa: B018


@pytest.mark.parametrize("module", ["", ".group", ".setup", ".schedule", ".rollout_files"])
def test_light_modules_load_no_heavy_package(module) -> None:
    """Ray Train's own actors load `group` and `setup`; the tasks that save rollouts load `rollout_files`."""
    code = f"import sys, opdlm.learner{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
