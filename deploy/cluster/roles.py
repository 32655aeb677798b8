"""Ray itself: joining or starting a cluster, checking that it is large enough, starting the roles."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from opdlm.actors.pool import ActorPool, stop_actors
from opdlm.actors.queue.actor import start_queue
from opdlm.actors.rollout.actor import start_rollout_actor
from opdlm.actors.teacher.actor import start_teacher_actor
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.checks import is_loopback
from opdlm.common.config.schema import OnNewWeights, ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError, first_line
from opdlm.deploy.cluster.placement import Demands, Places, check_room, demands, reserve

log = logging.getLogger("opdlm.cluster")

_AUTH_MODE = "RAY_AUTH_MODE"
_MINIMUM_RAY = (2, 60)
"""As in pyproject.toml: a Ray that it starts has token authentication on unless told otherwise."""


@dataclass(slots=True)
class Roles:
    """The actors of a run."""

    queue: Any
    """Another one after a queue has died."""
    rollouts: ActorPool
    teachers: ActorPool
    evaluators: ActorPool | None = None
    """Spare rollout actors for periodic evaluations (`evaluation.actors`)."""
    places: Mapping[str, Places] = field(default_factory=dict)
    """By role, where its actors go."""

    def sizes(self) -> dict[str, int]:
        """How many actors of each kind can work now, for the metrics."""
        return {"rollout_actors": self.rollouts.serving, "teacher_actors": self.teachers.serving}

    def pools(self) -> list[ActorPool]:
        """All pools that there are."""
        return [pool for pool in (self.rollouts, self.teachers, self.evaluators) if pool is not None]

    def stop(self) -> None:
        """Ends them all."""
        stop_actors([self.queue, *(actor for pool in self.pools() for actor in pool.actors.values())])
        for places in self.places.values():
            places.free()


def connect(config: OpdlmConfig) -> None:
    """Joins the cluster of `resources.ray_address` (or RAY_ADDRESS), else starts a local one; checks its size."""
    join_or_start(config.resources, demands(config))
    check_room(config, "resources")


def join_or_start(resources: ResourcesConfig, asked: Demands) -> None:
    """The same without the check; a local Ray gets the CPUs that are asked for, and one.

    Raises:
        OpdlmError: a Ray without token authentication by default, or no cluster at the address.
        ConfigError: a dashboard that other machines reach, without authentication.
    """
    if ray.is_initialized():
        return
    check_security(resources, ray.__version__)
    logs = {"log_to_driver": resources.worker_logs, "logging_level": "warning"}
    needed = int(sum(count * each for _, count, each in asked["CPU"])) + 1
    # Not `auto`: it would find, and wait for, a cluster of this machine that died.
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{'resources.ray_address' if resources.ray_address else 'RAY_ADDRESS'}: found {address}, a dashboard's "
            "address; that is for `ray job submit` (--address or RAY_API_SERVER_ADDRESS), a run that joins by itself "
            "needs the head's host:port"
        )
    if address:
        try:
            ray.init(address=address, **logs)
        except ConnectionError as error:
            reason = first_line(error)
            raise OpdlmError(f"resources.ray_address: no cluster answers at {address}: {reason}") from None
    else:
        ray.init(
            address="local",
            num_cpus=resources.local_cpus or needed,
            include_dashboard=resources.local_dashboard,
            dashboard_host=resources.dashboard_host,
            **logs,
        )
    if os.environ.get(_AUTH_MODE, "").lower() != "token":  # Ray sets it where it turns authentication on
        log.warning(
            "Ray's token authentication is off: whoever reaches this cluster's ports can run code on it "
            "(%s=token turns it on, for the head and for all who join)",
            _AUTH_MODE,
        )


def check_security(resources: ResourcesConfig, version: str) -> None:
    """Refuses what would let strangers in, before any Ray is started or joined. `version`: Ray's, as in `2.60.0`."""
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_RAY:
        needed = ".".join(map(str, _MINIMUM_RAY))
        raise OpdlmError(
            f"ray: found {version}, whose token authentication may be missing or off; at least {needed} is needed: "
            f"pip install -U 'ray[default,train]>={needed}'"
        )
    mode = os.environ.get(_AUTH_MODE, "token")  # unset: on in a Ray that is started here
    if not is_loopback(resources.dashboard_host) and mode.lower() != "token":
        raise ConfigError(
            f"resources.dashboard_host: found {resources.dashboard_host!r} with {_AUTH_MODE}={mode}; other machines "
            f"could run code here: use 127.0.0.1, or {_AUTH_MODE}=token"
        )


def start_roles(config: OpdlmConfig, student: str, total: int, first_round: int) -> Roles:
    """Starts queue, rollout actors and teacher actors under the names that the dashboard shows.

    A replay needs the queue alone; its pools are empty.
    """
    rollout, teacher, resources = config.rollout, config.teacher, config.resources
    timeout, retries = resources.call_timeout_seconds, resources.actor_restarts
    places = reserve(config)
    queue = start_queue(rollout.prompts_per_round, config.queue.max_staleness, total, first_round)
    if config.run.replay is not None:
        return Roles(queue, ActorPool({}, timeout, retries), ActorPool({}, timeout, retries))

    def students(role: str, name: str, count: int, on_new_weights: OnNewWeights) -> dict[str, Any]:
        names = [f"{name}-{i}" for i in range(count)]
        where = [places[role].options(i) for i in range(count)]
        return {n: start_rollout(config, n, student, on_new_weights, w) for n, w in zip(names, where, strict=True)}

    teachers = {
        f"teacher-{i}": start_teacher(config, f"teacher-{i}", places["teacher"].options(i))
        for i in range(teacher.actors)
    }
    rollouts = students("rollout", "rollout", rollout.actors, rollout.on_new_weights)
    spare = students("evaluation", "eval", config.evaluation.actors, "finish")
    return Roles(
        queue,
        ActorPool(rollouts, timeout, retries),
        ActorPool(teachers, timeout, retries),
        ActorPool(spare, timeout, retries) if spare else None,
        places,
    )


def start_rollout(
    config: OpdlmConfig, name: str, student: str, on_new_weights: OnNewWeights, where: Mapping[str, Any]
) -> Any:
    """One rollout actor of a run; `student`: folder of its start weights; `where`: see `Places.options`."""
    each = (config.rollout.cpus_per_actor, config.rollout.gpus_per_actor, config.resources.actor_restarts)
    return start_rollout_actor(
        name, student, config.model.dtype, *each, on_new_weights, config.rollout.cuda_graphs, **where
    )


def start_teacher(config: OpdlmConfig, name: str, where: Mapping[str, Any]) -> Any:
    """One teacher actor of a run; `where`: see `Places.options`."""
    restarts = config.resources.actor_restarts
    return start_teacher_actor(name, config.model.teacher, config.teacher, restarts, **where)
