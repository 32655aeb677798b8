"""The connection to Ray: joins a cluster or starts a local one, after the security checks."""

from __future__ import annotations

import logging
import os

import ray

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.checks import is_loopback
from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError, first_line
from opdlm.deploy.cluster.local_ray import start_local_ray
from opdlm.deploy.cluster.placement import Demands, check_room, demands

log = logging.getLogger("opdlm.connection")

_AUTH_MODE = "RAY_AUTH_MODE"
_MINIMUM_RAY = (2, 60)
"""As in pyproject.toml. From this version on, a Ray that is started has token authentication on by default."""


def connect(config: OpdlmConfig) -> None:
    """Joins or starts Ray (`join_or_start`), and checks that the cluster is large enough for the run.

    Raises:
        OpdlmError: as `join_or_start` and `check_room`.
    """
    join_or_start(config.resources, demands(config))
    check_room(config, "resources")


def join_or_start(resources: ResourcesConfig, asked: Demands) -> None:
    """Joins the cluster of `resources.ray_address` or RAY_ADDRESS; without an address, starts a local Ray.

    Does nothing where Ray is initialised. A local Ray has one CPU more than `asked` sums up to, unless
    `resources.local_cpus` is set.

    Raises:
        OpdlmError: a Ray without token authentication by default, or no cluster at the address.
        ConfigError: a dashboard that other machines can reach without authentication, or a dashboard's address.
    """
    if ray.is_initialized():
        return
    check_security(resources, ray.__version__)
    logs = {"log_to_driver": resources.worker_logs, "logging_level": "warning"}
    # Not `auto`, which would find a dead cluster of this machine and wait for it.
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{'resources.ray_address' if resources.ray_address else 'RAY_ADDRESS'}: found {address}, a dashboard's "
            "address, which is for `ray job submit` (--address or RAY_API_SERVER_ADDRESS); to join a cluster, give the "
            "head's host:port"
        )
    if address:
        try:
            ray.init(address=address, **logs)
        except ConnectionError as error:
            reason = first_line(error)
            raise OpdlmError(f"resources.ray_address: no cluster answers at {address}: {reason}") from None
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
