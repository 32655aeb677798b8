"""A cluster of two Ray nodes on this machine for `ray job submit`, started as a user starts one: by `ray start`.

It has token authentication. Its Python environment has what opdlm depends on but not opdlm itself, so a job runs the
code that the working directory brought there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests import REPOSITORY
from tests.package.environments import environment_without_opdlm
from tests.patience import PATIENCE, wait_until
from tests.ports import free_ports

RUNTIME_ENV = "deploy/cluster_files/runtime_env.yaml"
CPUS_PER_NODE = 3
START_ATTEMPTS = 5


class SubmittedCluster:
    """A head with a dashboard, and one more node. Each has its own session folder, as on two machines.

    Args:
        folder: for session folders and the environment. Ray's socket paths, which start with it, have at most 107
            bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        self.token = token.read_text()
        self.python = environment_without_opdlm(folder / "venv")
        gcs, self.dashboard, client = free_ports(3)
        self.environment = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "PYTHONPATH"))}
        self.environment |= {
            "PATH": os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        self._head = (
            *("--head", f"--port={gcs}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}"),
            f"--temp-dir={folder / 'head'}",
        )
        self._node = f"--address=127.0.0.1:{gcs}", f"--temp-dir={folder / 'node'}", '--resources={"train": 2}'

    @contextmanager
    def start(self) -> Iterator[None]:
        """Starts both nodes. The second one alone has the resource `train`."""
        with (
            self._start_node(self._head, lambda: len(self.alive_nodes()) == 1),
            self._start_node(self._node, lambda: len(self.alive_nodes()) == 2),
        ):
            yield

    @contextmanager
    def _start_node(self, options: tuple[str, ...], ready: Callable[[], bool]) -> Iterator[None]:
        """Starts one node; ends all its processes afterwards."""
        # Other clusters on this machine may use Ray's default ports.
        own = "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"
        own += ("--include-log-monitor=false",)  # no test reads the log lines of the actors
        size = f"--num-cpus={CPUS_PER_NODE}", "--num-gpus=0", "--object-store-memory=200000000"
        command = self.ray("start", "--block", "--node-ip-address=127.0.0.1", *options, *own, *size)
        file = self.folder / "ray-start.log"

        def started() -> bool:
            return process.poll() is not None or ready()

        # `ray start` gives its raylet 30 s and then ends; a busy machine may take longer.
        for _ in range(START_ATTEMPTS):
            with file.open("a") as log:
                process = subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            try:
                wait_for(started, "node")
                if process.poll() is None:
                    yield
                    return
            finally:
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                process.terminate()
                for left in psutil.wait_procs([*family, process], timeout=PATIENCE)[1]:
                    left.kill()
                process.wait()
        raise AssertionError(f"ray start ended {START_ATTEMPTS} times:\n{file.read_text()[-2000:]}")

    def ray(self, *arguments: str) -> list[str]:
        """The `ray` command of the cluster's environment."""
        return [str(self.python), "-m", "ray.scripts.scripts", *arguments]

    def submit(self, name: str, entrypoint: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        """Runs `ray job submit` in the root of the repository."""
        command = self.ray(
            "job", "submit", f"--runtime-env={RUNTIME_ENV}", "--working-dir=.", f"--submission-id={name}"
        )
        return subprocess.run(
            [*command, *options, "--", *entrypoint],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )

    def ask(self, path: str) -> Any:
        """The answer of the dashboard's HTTP API, asked with the token."""
        address = f"http://127.0.0.1:{self.dashboard}{path}"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """The state API's list of `actors` or `nodes`."""
        return self.ask(f"/api/v0/{kind}?limit=1000")["data"]["result"]["result"]

    def alive_nodes(self) -> set[str]:
        """Ids of the nodes that are alive."""
        return {node["node_id"] for node in self.state("nodes") if node["state"] == "ALIVE"}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """`wait_until` for a condition that may raise OSError, which means that a server has not started yet."""

    def asked() -> Any:
        with contextlib.suppress(OSError):
            return condition()

    return wait_until(asked, what)
