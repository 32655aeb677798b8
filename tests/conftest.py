"""Fixtures: one small Ray cluster for all tests that need one, shut down at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A cluster of this machine with eight logical CPUs and no GPU; RAY_ADDRESS points to it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    import ray

    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(cluster) -> str:
    """Its address."""
    return cluster.address


@pytest.fixture(scope="session")
def victims(cluster) -> Any:
    """The processes of its actors (`tests.system.victims.Victims`)."""
    from tests.system.victims import Victims, raylets_of

    return Victims(lambda: raylets_of(cluster))


@pytest.fixture(scope="session")
def chain_teacher(tmp_path_factory) -> Path:
    """A random, untrained teacher with the chain task's tokenizer."""
    from tests.tiny import save_teacher

    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def whole(ray_cluster, chain_teacher, tmp_path_factory) -> Path:
    """Run directory of an unbroken run of `tests.system.runs.run_config`, with a checkpoint of each round."""
    from rich.console import Console

    from opdlm.deploy.run.train import train
    from tests.system.runs import ROUNDS, losses, run_config

    folder = tmp_path_factory.mktemp("unbroken") / "whole"
    assert train(run_config(chain_teacher, folder), resume=False, console=Console(quiet=True)) == 0
    assert len(losses(folder)) == 2 * ROUNDS
    return folder
