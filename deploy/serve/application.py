"""The Ray Serve application: one `Api` in front of the engines. `serve deploy deploy/serve.yaml` calls `build`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import DeploymentActorConfig

from opdlm.deploy.serve.api import Api
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.replica import EngineReplica
from opdlm.deploy.serve.weights import KEEPER, WeightsKeeperActor

_DRAIN_SECONDS = 600.0


def application(options: ServeOptions) -> Any:
    """The application of options that are `resolved`, for `serve.run`."""
    many: dict[str, Any] = {"num_replicas": options.replicas}
    if options.autoscale_to is not None:
        many = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": max(options.replicas, options.autoscale_to),
                "target_ongoing_requests": options.slots,
            }
        }
    # More than the front lets in, so that it refuses by itself, with an error in OpenAI's shape, and requests wait in
    # the engines: while those are full, Serve's router looks only every 0.5 s, for two requests, whether one has room.
    ongoing = 10 * options.max_requests
    engines = serve.deployment(EngineReplica).options(
        name="engine",
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        deployment_actors=[
            DeploymentActorConfig(name=KEEPER, actor_class=WeightsKeeperActor, actor_options={"num_cpus": 0})
        ],
        **many,
    )
    api = serve.deployment(Api).options(
        name="api",
        num_replicas=1,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
    )
    return api.bind(options, engines.bind(options))


def build(args: dict[str, Any]) -> Any:
    """The application of a Serve config file. `args`: the fields of `ServeOptions`.

    Raises:
        OpdlmError: see `ServeOptions.resolved`.
    """
    return application(ServeOptions.model_validate(args).resolved())
