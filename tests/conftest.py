"""Fixtures: one small Ray cluster for all tests that need one, and what runs in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

ATTEMPTS = 5
"""How often a Ray that does not come up is started."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several processes (`pytest -n 2 --dist loadgroup`): one has all tests with Ray, and so one cluster; others
    share the other files."""
    for item in items:
        needs_ray = item.get_closest_marker("ray") or "cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if needs_ray else str(item.path)))


def ray_head(cpus: int) -> Any:
    """A cluster of one node without GPU. Ray gives a node 30 s to start, which a busy machine may need and more."""
    import psutil
    from ray.cluster_utils import Cluster

    before = psutil.Process().children(recursive=True)
    for attempt in count(1):
        try:
            return Cluster(
                initialize_head=True, head_node_args={"num_cpus": cpus, "num_gpus": 0, "include_dashboard": False}
            )
        except Exception as error:  # Ray raises no class of its own
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise
        for process in set(psutil.Process().children(recursive=True)) - set(before):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster on this machine with eight logical CPUs and no GPU. RAY_ADDRESS has its address."""
    from opdlm.deploy.cluster.local_ray import WORKER_ENVIRONMENT, defaults_in_environment

    with defaults_in_environment(WORKER_ENVIRONMENT):
        cluster = ray_head(8)
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    import ray

    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def two_nodes(monkeypatch) -> Iterator[Any]:
    """A cluster for one test: a head with four logical CPUs, and a node with four and with the resource `second`.

    The attribute `second` is that node. This process is connected to the cluster.
    """
    import ray

    from opdlm.deploy.cluster.local_ray import WORKER_ENVIRONMENT, defaults_in_environment

    ray.shutdown()
    with defaults_in_environment(WORKER_ENVIRONMENT):
        cluster = ray_head(4)
        cluster.second = cluster.add_node(num_cpus=4, resources={"second": 4})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


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

    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def whole(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    """Directory of an unbroken run of `tests.system.runs.run_config`, with checkpoint and rollouts of each round."""
    from rich.console import Console

    from opdlm.deploy.run.train import train
    from tests.system.runs import ROUNDS, losses, run_config

    folder = tmp_path_factory.mktemp("unbroken") / "whole"
    assert (
        train(run_config(chain_teacher, folder, run={"dump_rollouts": True}), resume=False, console=Console(quiet=True))
        == 0
    )
    assert len(losses(folder)) == 2 * ROUNDS
    return folder
