"""The connection to Ray: joins a cluster or starts a local one, after the security checks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.checks import is_loopback
from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError, first_line
from opdlm.deploy.cluster.import_name import check_import_name
from opdlm.deploy.cluster.local_ray import start_local_ray
from opdlm.deploy.cluster.placement import Demands, check_room, demands
from opdlm.deploy.cluster.process_end import ends_process_after
from opdlm.deploy.cluster.reach import check_reachable

log = logging.getLogger("opdlm.connection")

_AUTH_MODE = "RAY_AUTH_MODE"
_JOIN_SECONDS = 30.0
"""Longest wait to join a cluster whose head has answered."""
_MINIMUM_RAY = (2, 60)
"""As in pyproject.toml. From this version on, a Ray that is started has token authentication on by default."""


def connect(config: OpdlmConfig) -> None:
    """Joins or starts Ray (`join_or_start`), and checks that the cluster is large enough for the run.

    Raises:
        OpdlmError: as `join_or_start` and `check_room`.
    """
    join_or_start(config.resources, demands(config))
    check_room(config, "resources")


def connecting(resources: ResourcesConfig) -> str:
    """In words, what `connect` is about to do."""
    address, _ = _address(resources)
    return f"joining the Ray cluster at {address}" if address else "starting Ray on this machine"


def _address(resources: ResourcesConfig) -> tuple[str | None, str]:
    """The address of the cluster to join, and what says so; None to start a local Ray."""
    address, where = resources.ray_address, "resources.ray_address"
    if address in (None, "", "auto") and os.environ.get("RAY_ADDRESS"):
        address, where = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    return (address if address and address != "local" else None), where


def join_or_start(resources: ResourcesConfig, asked: Demands) -> None:
    """Joins the cluster of `resources.ray_address` or RAY_ADDRESS; without an address, starts a local Ray.

    Does nothing where Ray is initialised. A local Ray has one CPU more than `asked` sums up to, unless
    `resources.local_cpus` is set.

    Raises:
        OpdlmError: another `opdlm` in the way of the workers (`check_import_name`); a Ray without token authentication
            by default; no cluster at the address, or one that refuses this process (`check_reachable`); a local Ray
            that does not start (`start_local_ray`).
        ConfigError: a dashboard that other machines can reach without authentication, or a dashboard's address.
    """
    if ray.is_initialized():
        return
    check_import_name()
    check_security(resources, ray.__version__)
    # Ray says that token authentication is on, and how to turn it off; that it is off, we say below.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    logs = {"log_to_driver": resources.worker_logs, "logging_level": "warning"}
    address, where = _address(resources)
    if address:
        _join(address, where, logs)
    else:
        start_local_ray(
            num_cpus=resources.local_cpus or int(sum(count * each for _, count, each in asked["CPU"])) + 1,
            include_dashboard=resources.local_dashboard,
            dashboard_host=resources.dashboard_host,
            **logs,
        )
    if os.environ.get(_AUTH_MODE, "").lower() != "token":  # Ray sets it when it turns authentication on
        log.warning(
            "Ray's token authentication is off: whoever reaches this cluster's ports can run code on it "
            "(%s=token turns it on, for the head and for every process that joins)",
            _AUTH_MODE,
        )


def _join(address: str, where: str, logs: Mapping[str, Any]) -> None:
    address = check_reachable(address, where)
    slow = f"{where}: the cluster at {address} has not let this process join within {_JOIN_SECONDS:g} s"
    with ends_process_after(_JOIN_SECONDS, slow):
        try:
            ray.init(address=address, **logs)
        except Exception as error:  # Ray raises bare `Exception`s too; a ConnectionError's cause says more
            ray.shutdown()
            reason = first_line(error.__cause__ or error)
            raise OpdlmError(f"{where}: the cluster at {address} cannot be joined: {reason}") from None


def check_security(resources: ResourcesConfig, version: str) -> None:
    """Refuses settings with which strangers could run code, before Ray is started or joined.

    `version`: of Ray, such as `2.60.0`.

    Raises:
        OpdlmError: a Ray that may lack token authentication.
        ConfigError: a dashboard that other machines can reach, with authentication off.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_RAY:
        needed = ".".join(map(str, _MINIMUM_RAY))
        raise OpdlmError(
            f"ray: found {version}, whose token authentication may be missing or off; at least {needed} is needed: "
            f"pip install -U 'ray[default,train]>={needed}'"
        )
    mode = os.environ.get(_AUTH_MODE, "token")  # where it is unset, a Ray that is started here turns it on
    if not is_loopback(resources.dashboard_host) and mode.lower() != "token":
        raise ConfigError(
            f"resources.dashboard_host: found {resources.dashboard_host!r} with {_AUTH_MODE}={mode}; other machines "
            f"could run code here: use 127.0.0.1, or {_AUTH_MODE}=token"
        )
