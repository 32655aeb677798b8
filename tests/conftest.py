"""Fixtures: a small Ray cluster for the tests that need one, and what runs in it.

For several processes (`pytest -n 2 --dist loadfile --no-loadscope-reorder`, as make calls it): each process has a
cluster of its own, which its first test with Ray starts. They share the models and runs that are made once
(`made_once`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

RAY_SETTINGS = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Of the processes that Ray Train starts beside the ranks, the one that can be left out. It looks out for nodes that
    # a cloud takes back, and no test has one. Runs that start their own Ray (tests/package, a submitted job) have it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment variables of the tests' clusters and runs, unless the user has others. Ray gives a process 60 s to start,
and a busy machine may take longer."""

START_ATTEMPTS = 5
"""Of a node of Ray that is too slow."""

for _name, _value in RAY_SETTINGS.items():
    os.environ.setdefault(_name, _value)

with suppress(ImportError):  # the environment of tests/vllm has no hypothesis
    import hypothesis

    hypothesis.settings.register_profile("opdlm", deadline=None)  # no test depends on how fast the machine is
    hypothesis.settings.load_profile("opdlm")

LONGEST_FIRST = ("test_run_storage.py", "test_groups.py", "test_early_end.py", "test_deaths.py", "test_job_submit.py")
"""The files that come first; then others with Ray, then the rest. A process that ends with a long file has the others
wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several processes, which get whole files (`--dist loadfile`): the longest first."""

    def needs_ray(item: pytest.Item) -> bool:
        return bool(item.get_closest_marker("ray") or "cluster" in getattr(item, "fixturenames", ()))

    with_ray = {item.path for item in items if needs_ray(item)}
    first = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first) + (item.path not in with_ray)))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this name that all processes of the test run share; the first one that asks makes it, others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.made"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that did not come to its end
            make(folder)
            done.touch()
    return folder


def start_node(cluster: Any, **arguments: Any) -> Any:
    """Adds a node to a cluster of `cluster_of`, the head first; returns it.

    Ray gives the node 30 s, and the node gives its agent 15 s, which no setting changes. So one node starts at a time,
    whichever process of the test run asks, and one that was too slow is removed and started again.

    Args:
        arguments: what it has besides no GPU. No node has a log monitor, since no test reads what the actors print.
    """
    import psutil

    from opdlm.deploy.cluster.local_ray import WORKER_ENVIRONMENT, defaults_in_environment

    node = {"num_gpus": 0, "include_dashboard": False, "include_log_monitor": False} | arguments
    here = psutil.Process()
    with open(Path(tempfile.gettempdir()) / f"opdlm-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in reversed(range(START_ATTEMPTS)):
            before = set(here.children(recursive=True))
            try:
                with defaults_in_environment(WORKER_ENVIRONMENT):
                    return cluster.add_node(**node)
            except Exception as problem:  # Ray's own class
                if left == 0 or "timed out" not in str(problem).lower():  # the node's own word, or `add_node`'s
                    raise
                for process in set(here.children(recursive=True)) - before:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()


@contextmanager
def cluster_of(*nodes: dict[str, Any]) -> Iterator[Any]:
    """A Ray cluster on this machine. RAY_ADDRESS has its address; this process leaves it at the end.

    `nodes`: arguments of `start_node`, the head's first.
    """
    import ray
    from ray.cluster_utils import Cluster

    from opdlm.deploy.cluster import connection

    connection._JOIN_SECONDS = PATIENCE  # a join that takes longer would end this process
    cluster = Cluster()
    for node in nodes:
        start_node(cluster, **node)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster on this machine with eight logical CPUs and no GPU. RAY_ADDRESS has its address."""
    with cluster_of({"num_cpus": 8}) as cluster:
        yield cluster


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A cluster for one test: a head with four logical CPUs, and a node with four and with the resource `second`.

    The attribute `second` is that node. This process is connected to the cluster.
    """
    import ray

    ray.shutdown()
    with cluster_of({"num_cpus": 4}, {"num_cpus": 4, "resources": {"second": 4}}) as cluster:
        (cluster.second,) = cluster.worker_nodes
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster


@pytest.fixture(scope="session")
def ray_cluster(cluster) -> str:
    """The address of the cluster."""
    return cluster.address


@pytest.fixture(scope="session")
def victims(cluster) -> Any:
    """The actor processes of the cluster (`tests.system.victims.Victims`)."""
    from tests.system.victims import Victims, raylets_of

    return Victims(lambda: raylets_of(cluster))


@pytest.fixture(scope="session")
def chain_teacher(tmp_path_factory) -> Path:
    """Folder of an untrained teacher with random weights and the chain task's tokenizer."""
    from tests.tiny import save_teacher

    return made_once(tmp_path_factory, "teacher", save_teacher)


@pytest.fixture(scope="session")
def whole(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    """Directory of an unbroken run of `tests.system.runs.run_config`, with checkpoint and rollouts of each round."""
    from rich.console import Console

    from opdlm.deploy.run.train import train
    from tests.system.runs import ROUNDS, losses, run_config

    def make(folder: Path) -> None:
        config = run_config(chain_teacher, folder, run={"dump_rollouts": True})
        assert train(config, resume=False, console=Console(quiet=True)) == 0
        assert len(losses(folder)) == 2 * ROUNDS

    return made_once(tmp_path_factory, "whole", make)
