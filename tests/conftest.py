"""Fixtures: one small Ray cluster for all tests that need one, shut down at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory) -> Iterator[str]:
    """Address of a cluster of this machine with eight logical CPUs and no GPU; RAY_ADDRESS points to it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster.address
    import ray

    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def chain_teacher(tmp_path_factory) -> Path:
    """A random, untrained teacher with the chain task's tokenizer."""
    from tests.tiny import save_teacher

    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")
