"""The settings of the machines and of the Ray cluster that a run works on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opdlm.common.config.base import NonNegativeInt, Number, PositiveInt, Section, Switch


class MachinesConfig(Section):
    """Like machines with GPUs, as memory is concerned; a head of the cluster without GPUs does not count."""

    nodes: PositiveInt = 1
    """Number of machines."""
    gpus: NonNegativeInt = 0
    """Number of GPUs of each machine."""
    gpu_gib: Annotated[Number, Field(ge=0)] = 0
    """Memory of one GPU in GiB. 0: not known, so it is not compared."""
    memory_gib: Annotated[Number, Field(gt=0)]
    """Host memory of one machine in GiB."""
    object_store_gib: Annotated[Number, Field(gt=0)] | None = None
    """Size of Ray's object store on each machine, a part of its host memory (`ray start --object-store-memory`, in
    bytes). Empty: what Ray takes by itself, 30 % of the memory and at most 200 GB."""


class ResourcesConfig(Section):
    """The Ray cluster, and how many failures and how long a wait the run accepts."""

    ray_address: str | None = None
    """Address (`host:port`) of the head of the Ray cluster to join. Empty: the cluster of the environment variable
    RAY_ADDRESS, which Ray sets in a submitted job; without that variable, a local Ray is started."""
    machines: MachinesConfig | None = None
    """The machines that the run is meant for: `opdlm plan` warns of what does not fit into their memory. Empty: this
    machine, or no comparison where the run joins a cluster. A run that has joined one is compared with its nodes."""
    local_cpus: PositiveInt | None = None
    """Number of logical CPUs of a local Ray; it may exceed the real number. Empty: as many as the run asks for."""
    local_dashboard: Switch = True
    """Start the dashboard of a local Ray."""
    dashboard_host: str = "127.0.0.1"
    """Address on which the dashboard of a local Ray listens. The default is reachable from this machine only. Any other
    address needs Ray's token authentication (on unless RAY_AUTH_MODE says otherwise), because everyone who reaches the
    dashboard can run code."""
    worker_logs: Switch = False
    """Show the log lines of the actors on this terminal. They are kept in Ray's session folder in any case."""
    actor_restarts: NonNegativeInt = 3
    """Number of times that each rollout actor, each teacher actor and the replay queue may die and be started again.
    After that the run goes on without the actor; it ends with the last actor of a pool, or with the queue. Going back
    to an older checkpoint because the newest is damaged counts with the deaths of the queue."""
    sample_attempts: PositiveInt = 3
    """Number of times that a call to decode or score prompts is tried before the run ends with a checkpoint."""
    call_timeout_seconds: Annotated[Number, Field(gt=0)] = 1800.0
    """Longest wait for an answer of an actor, in seconds. After it the run ends with an error that names the actor.
    Raise it where one call takes longer, as with long responses."""
