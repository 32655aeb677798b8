"""Clusters that cannot be joined, and a local Ray that cannot start. `pytest tests/deploy/cluster/test_reach.py`

The heads are gRPC servers of the test, so that no Ray is started.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.deploy.cluster import connection, local_ray, reach
from tests import REPOSITORY
from tests.patience import PATIENCE
from tests.system.runs import run_to_end

VERSIONS = {"ray_version": ray.__version__, "python_version": platform.python_version()}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch) -> None:
    """No Ray runs, and nothing in the environment names one."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.ray, "init", lambda **_: pytest.fail("ray.init was called"))


def join(address: str | None) -> None:
    connection.join_or_start(ResourcesConfig(ray_address=address), {"CPU": [], "GPU": []})


@pytest.fixture
def start_head() -> Iterator[Callable[..., str]]:
    """Starts something that answers as a cluster's head does; returns its address."""
    servers = []

    def start(metadata: dict | None = None, refusal: grpc.StatusCode | None = None) -> str:
        class Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
            def InternalKVGet(self, request, context):
                if refusal is not None:
                    context.abort(refusal, "no")
                assert request.namespace == b"cluster"
                return gcs_service_pb2.InternalKVGetReply(value=json.dumps(metadata).encode())

        server = grpc.server(ThreadPoolExecutor(2))
        gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(Head(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "found 'head'; expected the head's host:port"),
        ("head:", "found 'head:'; expected the head's host:port"),
        ("10.0.0.1:70000", "expected the head's host:port"),
        ("10.0.0.1:6379/x", "expected the head's host:port"),
        ("::1:6379", "expected the head's host:port"),
        ("ray://head:10001", "a Ray client's address, which is for Ray Client; to join a cluster, give"),
        ("https://head:8265", "a dashboard's address, which is for `ray job submit`"),
    ],
)
def test_an_address_of_another_form_is_refused(address, message) -> None:
    with pytest.raises(ConfigError, match=r"resources\.ray_address: found") as raised:
        join(address)
    assert message in str(raised.value)


def test_the_variable_is_named_where_the_address_is_from_it(monkeypatch, closed_port) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with pytest.raises(OpdlmError, match=r"RAY_ADDRESS: no cluster answers at 127.0.0.1:\d+: Connection refused"):
        join(None)
    with pytest.raises(OpdlmError, match="RAY_ADDRESS: no cluster answers"):
        join("auto")


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(OpdlmError, match=r"no cluster answers at nowhere.invalid:6379: .*; is its head running"):
        join("nowhere.invalid:6379")


def test_a_port_that_says_nothing(silent_port, monkeypatch) -> None:
    monkeypatch.setattr(reach, "_ANSWER_SECONDS", 0.5)
    with pytest.raises(OpdlmError, match="something listens there, but not Ray's head"):
        join(f"127.0.0.1:{silent_port}")


def test_a_server_that_is_no_head(start_head) -> None:
    with pytest.raises(OpdlmError, match=r"something listens there, but not Ray's head \(unimplemented\)"):
        join(start_head(refusal=grpc.StatusCode.UNIMPLEMENTED))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (None, "has token authentication, and it is off in this process; set RAY_AUTH_MODE=token"),
        ("token", "refuses this process's token"),
    ],
)
def test_a_head_that_wants_another_token(start_head, monkeypatch, mode, message) -> None:
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(OpdlmError, match=message):
        join(start_head(refusal=grpc.StatusCode.UNAUTHENTICATED))


@pytest.mark.parametrize("other", [{"ray_version": "2.99.0"}, {"python_version": "3.12.1"}])
def test_a_head_with_other_versions(start_head, other) -> None:
    with pytest.raises(OpdlmError, match=f"runs Ray .*{next(iter(other.values()))}.*, this process Ray .*; use the"):
        join(start_head(VERSIONS | other))


def test_what_ray_says_when_it_refuses_is_one_line(start_head, monkeypatch) -> None:
    def init(**_) -> None:
        raise ConnectionError("Failed to connect") from RuntimeError("no raylet on this machine\nmore\nlines")

    monkeypatch.setattr(connection.ray, "init", init)
    with pytest.raises(OpdlmError, match=r"cannot be joined: no raylet on this machine$"):
        join(start_head(VERSIONS))


def test_auto_without_a_cluster_on_this_machine(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(OpdlmError, match="found auto, but no cluster runs on this machine"):
        join("auto")


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("kind", ["long", "a file", "below a file"])
def test_a_session_folder_that_does_not_do(monkeypatch, tmp_path, variable, kind) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (tmp_path / "file").write_text("")
    folder = {"long": tmp_path / ("x" * 90), "a file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}[kind]
    if len(str(tmp_path)) > 30:  # else the kinds are too long as well
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(local_ray, "_SOCKET_BYTES", 107 + (0 if kind == "long" else 200))
    monkeypatch.setenv(variable, str(folder))
    expected = r"would have \d+ bytes, and a socket's path has at most 107" if kind == "long" else "cannot be written: "
    with pytest.raises(OpdlmError, match=f"^{variable}: .*{expected}.*; set RAY_TMPDIR to a short folder"):
        join(None)


def test_a_local_ray_that_does_not_start(monkeypatch, tmp_path) -> None:
    def init(**_) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because")

    monkeypatch.setattr(local_ray.ray, "init", init)
    with pytest.raises(OpdlmError, match=r"a local Ray did not start: The current node timed out .*\(its logs are in"):
        join(None)


def test_rays_advice_to_turn_authentication_off_is_not_shown(monkeypatch) -> None:
    shown = []
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    monkeypatch.setattr(local_ray.ray, "init", lambda **_: shown.append(logger.isEnabledFor(logging.WARNING)))
    join(None)
    assert shown == [False]


def test_a_dead_address_ends_the_command(chain_teacher, tmp_path: Path, closed_port) -> None:
    """Before anything is written, and with nothing but our line."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path / 'run'}, rounds: 1}}\nmodel: {{teacher: {chain_teacher}, dtype: float32}}\n"
        "data: {task: chain, prompts: 8}\nrollout: {prompts_per_round: 8, max_new_tokens: 8}\n"
        "teacher: {dtype: float32}\nevaluation: {final_problems: 0}\n"
    )
    address = f"127.0.0.1:{closed_port}"
    done = run_to_end(file, environment=os.environ | {"RAY_ADDRESS": address})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"opdlm: RAY_ADDRESS: no cluster answers at {address}: Connection refused")
    assert not (tmp_path / "run").exists()


def test_a_token_that_is_missing_ends_with_one_line(start_head, tmp_path: Path) -> None:
    """In a process of its own, because Ray keeps the token that it has read."""
    script = (
        "from opdlm.deploy.cluster.reach import check_reachable\nfrom opdlm.deploy.cli.app import clear_errors\n"
        f"with clear_errors():\n    check_reachable('{start_head(VERSIONS)}', 'RAY_ADDRESS')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("opdlm:")]
    assert "cannot be asked: Token authentication is enabled but" in line
    assert line.endswith("; put the head's token into ~/.ray/auth_token, or name its file with RAY_AUTH_TOKEN_PATH")
