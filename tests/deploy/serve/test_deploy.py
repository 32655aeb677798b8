"""`serve deploy` of `deploy/serve.yaml` on a cluster of `ray start`, and engines that come with the load.

`pytest -m slow tests/deploy/serve/test_deploy.py`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests import REPOSITORY
from tests.deploy.serve.served import ask, endless_student, text
from tests.patience import PATIENCE
from tests.ports import free_ports
from tests.system.submitted_cluster import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SCRIPTS = [sys.executable, "-m", "ray.scripts.scripts"]
SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="os-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def head(folder: Path) -> Iterator[dict[str, str]]:
    """A head that `ray start` has started; gives the environment in which commands find it."""
    gcs, dashboard, client = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than Serve's 5 s
    }
    options = f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"
    own = (
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        f"--temp-dir={folder / 'ray'}",
    )
    command = [*SCRIPTS, "start", "--head", "--block", *options, *own]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{dashboard}/api/version"), "the dashboard")
        yield environment
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for left in psutil.wait_procs([*family, process], timeout=60)[1]:
            left.kill()
        process.wait()


def test_the_file_is_deployed_and_engines_come_with_the_load(folder) -> None:
    (port,) = free_ports(1)
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy/serve.yaml").read_text())
    content["http_options"]["port"] = port
    content["applications"][0]["args"] |= {
        "checkpoint": str(endless_student(folder, seed=1)),
        "name": "tiny",
        "replicas": 1,
        "autoscale_to": 2,
        "gpus_per_replica": 0,
        "slots": 2,
    }
    file, server = folder / "serve.yaml", f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(content))
    with head(folder) as environment:

        def serve(*arguments: str) -> str:
            done = subprocess.run(
                [*SERVE, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        def engines() -> int:
            application = yaml.safe_load(serve("status"))["applications"]["opdlm"]
            return int(application["deployments"]["engine"]["replica_states"].get("RUNNING", 0))

        serve("deploy", str(file))
        wait_for(lambda: answers(f"{server}/health"), "the server")
        expected = text(ask(server, "12+3=", 40))
        assert engines() == 1
        with ThreadPoolExecutor(12) as clients:
            ended = False

            def load() -> list[str]:
                return [text(ask(server, "12+3=", 40)) for _ in iter(lambda: ended, True)]

            waiting = [clients.submit(load) for _ in range(12)]
            try:
                wait_for(lambda: engines() == 2, "a second engine")
            finally:
                ended = True
            found = {answer for one in waiting for answer in one.result()}
        assert found == {expected}
        serve("shutdown", "--yes")


def answers(url: str) -> bool:
    """Whether a server answers there by now."""
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False
