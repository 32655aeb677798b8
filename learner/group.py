"""Starting the learner's worker group with Ray Train. Light to import: Ray Train's own actors load this file too."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError

_PATIENCE_SECONDS = 60.0
"""For an answer of the queue actor, which is never busy."""


@dataclass(frozen=True, slots=True)
class LearnerSetup:
    """What the worker group is started with; plain data, so that a restart gets the same."""

    config: dict[str, Any]
    """The resolved run file."""
    student: str
    """Folder of the student's start weights."""
    total_samples: int
    config_digest: str
    data_digest: str
    """Fingerprint of the prompts, in every checkpoint: a run is not resumed on other data."""
    queue: Any
    """Handle of the replay queue actor."""


def train_loop(arguments: dict[str, LearnerSetup]) -> None:
    """Entry point of every rank."""
    if _queue_is_gone(arguments["setup"].queue):
        return  # nobody could be asked for samples; the coordinator begins anew with another queue and another group
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what run.deterministic needs on a GPU
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from opdlm.learner.worker import run_rank  # torch, transformers, deepspeed: only in the ranks

    run_rank(arguments["setup"])


def _queue_is_gone(queue: Any) -> bool:
    import ray

    try:
        ray.get(queue.state.remote(), timeout=_PATIENCE_SECONDS)
    except ray.exceptions.RayActorError:
        return True
    return False


def fit(setup: LearnerSetup, experiment: str) -> None:
    """Runs the worker group to its end; blocks. Restarts it up to `learner.max_failures` times.

    Raises:
        OpdlmError: the group ended the run itself, for a reason that a restart would not mend.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = OpdlmConfig.model_validate(setup.config)
    learner = config.learner
    on_gpu = learner.gpus_per_worker > 0
    where = learner.placement
    each = {"CPU": 0.0} | where.resources(learner.cpus_per_worker, learner.gpus_per_worker)  # Ray Train's default is 1
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=learner.workers,
            use_gpu=on_gpu,
            resources_per_worker=each,
            placement_strategy="PACK" if where.group == "none" else where.group.upper(),
        ),
        run_config=train.RunConfig(
            name=experiment,
            storage_path=str(Path(setup.config["run"]["dir"]).resolve() / "ray_train"),
            failure_config=train.FailureConfig(max_failures=learner.max_failures),
        ),
    )
    trainer.fit()
    if reason := ray.get(setup.queue.reason_to_give_up.remote(), timeout=config.resources.call_timeout_seconds):
        raise OpdlmError(reason)
