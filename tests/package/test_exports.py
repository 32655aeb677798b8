"""What the packages export, and that importing them is cheap. `pytest tests/package/test_exports.py`"""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = [
    "opdlm",
    "opdlm.actors",
    "opdlm.actors.queue",
    "opdlm.actors.rollout",
    "opdlm.actors.teacher",
    "opdlm.common.config",
    "opdlm.common.data",
    "opdlm.common.data.tasks",
    "opdlm.common.export",
    "opdlm.common.model",
    "opdlm.learner",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_and_documented(name) -> None:
    package = import_module(name)
    assert package.__doc__
    assert len(package.__all__) == len(set(package.__all__)) > 0
    for public in package.__all__:
        member = getattr(package, public)
        assert not inspect.ismodule(member), f"{public} is also the name of a module"
        if inspect.isfunction(member) or inspect.isclass(member):
            assert member.__module__.startswith(name), f"{public} belongs to {member.__module__}"
            assert member.__doc__, f"{public} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_importing_the_packages_loads_no_heavy_library() -> None:
    """The packages load neither torch nor Ray; the pool, the decoder's settings and the worker group load no torch."""
    code = (
        f"import sys, {', '.join(PACKAGES)}\n"
        "assert not {'torch', 'transformers', 'ray', 'deepspeed'} & sys.modules.keys()\n"
        "import opdlm.actors.pool, opdlm.actors.rollout.settings, opdlm.learner.group\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
