"""A Ray that a command starts for itself on this machine, and that ends with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

WORKER_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's 15 leaves a worker about 1/30 of a core beside other work
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits for another one sleeps; by default it keeps the core busy
}
"""Environment variables of the processes of a Ray that we start. The user's own values win."""


def start_local_ray(**arguments: Any) -> None:
    """Starts Ray on this machine. `arguments`: of `ray.init`."""
    with defaults_in_environment(WORKER_ENVIRONMENT):
        ray.init(address="local", **arguments)


@contextmanager
def defaults_in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets those environment variables that are not set, for the processes that start in the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
