"""Starts the learner's worker group with Ray Train.

Light to import: Ray Train's own actors load this file too, so torch, transformers and deepspeed are imported only
inside the ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.learner.setup import LearnerSetup

_QUEUE_TIMEOUT_SECONDS = 60.0
"""Longest wait for an answer of the queue actor, which answers at once."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of torch's allocator, the present name and the former."""


class LearnerBehind(OpdlmError):
    """The newest checkpoint is damaged: the run goes back to an older one, with a new replay queue."""


def fit(setup: LearnerSetup, experiment: str) -> None:
    """Runs the worker group until training ends; blocks. Restarts it up to `learner.max_failures` times.

    Args:
        experiment: name of the Ray Train run.

    Raises:
        LearnerBehind: the replay queue has let go of rounds that must be trained again.
        OpdlmError: the group itself ended the run, for a reason that a restart would not remove.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchTrainer

    config = OpdlmConfig.model_validate(setup.config)
    learner = config.learner
    on_gpu = learner.gpus_per_worker > 0
    placement = learner.placement
    # Ray Train reserves one CPU per worker where none is named.
    per_worker = {"CPU": 0.0} | placement.resources(learner.cpus_per_worker, learner.gpus_per_worker)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"setup": setup},
        torch_config=_torch_config(on_gpu),
        scaling_config=train.ScalingConfig(
            num_workers=learner.workers,
            use_gpu=on_gpu,
            resources_per_worker=per_worker,
            placement_strategy="PACK" if placement.group == "none" else placement.group.upper(),
        ),
        run_config=train.RunConfig(
            name=experiment,
            storage_path=str(Path(setup.config["run"]["dir"]).resolve() / "ray_train"),
            failure_config=train.FailureConfig(max_failures=learner.max_failures),
            worker_runtime_env=rank_environment(config, os.environ),
        ),
    )
    trainer.fit()
    limit = config.resources.call_timeout_seconds
    if reason := ray.get(setup.queue.reason_to_give_up.remote(), timeout=limit):
        raise OpdlmError(reason)
    if reason := ray.get(setup.queue.reason_to_go_back.remote(), timeout=limit):
        raise LearnerBehind(reason)


def rank_environment(config: OpdlmConfig, given: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of the ranks. On a GPU, torch's allocator gets segments that can grow.

    Micro-batches differ in length, and responses grow during a run. Segments of a fixed size would then leave gaps that
    no later tensor fits into. The allocator reads its settings when torch is loaded, before any code of ours runs.

    Args:
        given: the driver's environment variables; a setting of the user wins. `nixl` registers memory with the network,
            which growing segments may not allow, so the allocator stays as it is.
    """
    grows = config.learner.gpus_per_worker > 0 and config.rollout.weight_transport != "nixl"
    if not grows or any(name in given for name in _ALLOCATOR):
        return {}
    return {"env_vars": {_ALLOCATOR[0]: "expandable_segments:True"}}


def _torch_config(on_gpu: bool) -> Any:
    from ray.train.torch import TorchConfig

    if not on_gpu:
        return TorchConfig(backend="gloo")
    from opdlm.learner.gpu_backend import GpuConfig

    return GpuConfig()


def train_loop(arguments: dict[str, LearnerSetup]) -> None:
    """Entry point of every rank. `arguments`: the setup under `setup`."""
    if _queue_is_dead(arguments["setup"].queue):
        return  # No samples could be taken; the driver starts another queue and another group.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # run.deterministic needs it on a GPU
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from opdlm.learner.worker import run_rank

    run_rank(arguments["setup"])


def _queue_is_dead(queue: Any) -> bool:
    import ray

    try:
        ray.get(queue.state.remote(), timeout=_QUEUE_TIMEOUT_SECONDS)
    except ray.exceptions.RayActorError:
        return True
    return False
