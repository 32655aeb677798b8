"""The Ray that a command starts for itself. `pytest tests/deploy/cluster/test_local_ray.py`"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opdlm.common.config.schema import ResourcesConfig
from opdlm.deploy.cluster import connection, local_ray
from tests import REPOSITORY
from tests.patience import PATIENCE

_IN_A_WORKER = """
import os, ray
from opdlm.common.config.schema import ResourcesConfig
from opdlm.deploy.cluster.connection import join_or_start

join_or_start(ResourcesConfig(local_dashboard=False), {"CPU": [("rollout", 1, 1)], "GPU": []})
seen = ray.remote(lambda: (os.nice(0), os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")))
print("worker", *ray.get(seen.options(num_cpus=2).remote()), "driver", os.nice(0))
"""


@pytest.fixture
def environment_at_start(monkeypatch) -> list[dict[str, str]]:
    """The environment in which `ray.init` is called; Ray itself is not started."""
    seen: list[dict[str, str]] = []
    for name in ("RAY_ADDRESS", "RAY_worker_niceness", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local_ray.ray, "init", lambda **_: seen.append(dict(os.environ)))
    return seen


def test_processes_of_a_local_ray_are_not_nice_and_wait_passively(environment_at_start) -> None:
    before = dict(os.environ)
    connection.join_or_start(ResourcesConfig(), {"CPU": [], "GPU": []})
    (seen,) = environment_at_start
    assert (seen["RAY_worker_niceness"], seen["OMP_WAIT_POLICY"]) == ("0", "PASSIVE")
    assert float(seen["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) > 5, "Serve's own"
    assert 0 < int(seen["GOMP_SPINCOUNT"]) < 300_000, "a short wait, not OpenMP's own"
    assert {name: os.environ.get(name) for name in before} == before
    assert "RAY_worker_niceness" not in os.environ, "a variable for Ray's processes stays in this one's environment"


def test_what_the_user_says_about_them_wins(environment_at_start, monkeypatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "19")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    connection.join_or_start(ResourcesConfig(), {"CPU": [], "GPU": []})
    (seen,) = environment_at_start
    assert (seen["RAY_worker_niceness"], seen["OMP_WAIT_POLICY"]) == ("19", "ACTIVE")


@pytest.mark.ray
def test_a_worker_has_them() -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_WORKER],
        cwd=REPOSITORY,
        env=unset,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1].split()
    assert line[:4] == ["worker", line[-1], "PASSIVE", "2"]
