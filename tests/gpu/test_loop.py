"""Whole runs on one GPU that all roles share, through Ray. `pytest tests/gpu/test_loop.py`

The shares are those of `deploy/one-gpu.yaml`; the teacher is tiny. With `OPDLM_TEST_DEVICE=cpu` the shares are 0.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdlm.actors.rollout.actor import start_rollout_actor
from opdlm.actors.teacher.actor import start_teacher_actor
from opdlm.common.config import OpdlmConfig, load_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.types import RolloutRequest
from opdlm.deploy.cluster.local_ray import WORKER_ENVIRONMENT, defaults_in_environment
from opdlm.deploy.run.recipes import find_run_file
from tests.gpu import DEVICE, NEEDS_GPU
from tests.patience import PATIENCE
from tests.system.runs import ROUNDS, assert_sound, records_of, run_config, run_until, running, wait_for_rounds
from tests.system.victims import Victims, raylets_of
from tests.tiny import request, save_teacher

pytestmark = [NEEDS_GPU, pytest.mark.ray]


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[Any]:
    """A Ray cluster on this machine with the GPU. RAY_ADDRESS has its address."""
    import ray
    from ray.cluster_utils import Cluster

    given = os.environ.get("RAY_ADDRESS")
    head = {"num_cpus": 8, "num_gpus": int(DEVICE == "cuda"), "include_dashboard": False}
    with defaults_in_environment(WORKER_ENVIRONMENT):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()
    if given is not None:
        os.environ["RAY_ADDRESS"] = given


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory) -> Path:
    """An untrained teacher whose heads are wide enough for flex_attention."""
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher", hidden_size=32, head_dim=32)


def shares() -> dict[str, float]:
    """The GPU shares of `deploy/one-gpu.yaml` by role; 0 on the CPU."""
    config = load_config(find_run_file(Path("one-gpu")))
    found = {
        "rollout": config.rollout.gpus_per_actor,
        "teacher": config.teacher.gpus_per_actor,
        "learner": config.learner.gpus_per_worker,
    }
    assert sum(found.values()) == pytest.approx(1.0)
    return {role: share * (DEVICE == "cuda") for role, share in found.items()}


def config_of(teacher: Path, run_dir: Path, **sections) -> OpdlmConfig:
    """A run of a few rounds in which every role has its share; its gradients are exact enough to compare losses."""
    share, cuda = shares(), DEVICE == "cuda"
    roles = {
        "rollout": {"gpus_per_actor": share["rollout"], "cuda_graphs": cuda}
        | {"prompts_per_round": 8, "batch_size": 4, "max_new_tokens": 9},
        "teacher": {"dtype": "float32", "gpus_per_actor": share["teacher"]},
        "learner": {"workers": 1, "batch_size": 4, "micro_batch_tokens": 512, "optimizer": {"lr": 1e-3}}
        | {"gpus_per_worker": share["learner"], "gradient_checkpointing": True},
        "run": {"dir": str(run_dir), "rounds": ROUNDS},
    }
    return run_config(teacher, run_dir, **(roles | sections))


def test_every_role_is_on_its_device(gpu_cluster, wide_teacher, tmp_path) -> None:
    """Actors with a share of the GPU are on it, also two in one; one without a share is on the CPU beside them."""
    import ray

    ray.init(address=gpu_cluster.address, log_to_driver=False, ignore_reinit_error=True)
    student, share = tmp_path / "student", shares()
    convert_checkpoint(wide_teacher, student, 4, "response")
    config = load_config(find_run_file(Path("one-gpu"))).teacher.model_copy(
        update={"gpus_per_actor": share["teacher"], "dtype": "float32"}
    )
    started = [
        start_rollout_actor("shared", str(student), "float32", 1, share["rollout"], 0),
        start_rollout_actor("without", str(student), "float32", 1, 0, 0),
    ]
    teacher = start_teacher_actor("teacher", str(wide_teacher), config, 0)
    try:
        devices = [ray.get(actor.use_student.remote(_device, None)) for actor in started]
        assert devices == [DEVICE, "cpu"]
        prompts = [request(5).prompt_ids % 10]
        (response,), _ = ray.get(teacher.generate.remote(prompts, 6, 1))
        assert 1 <= len(response) <= 6
        asked = [RolloutRequest(0, "0", prompts[0], 6, seed=0)]
        from opdlm.actors.rollout.settings import DecodeSettings

        how = DecodeSettings(4, "response")
        both = [ray.get(actor.decode.remote(asked, None, how, 1))[0][0] for actor in started]
        assert both[0].response.tolist() == both[1].response.tolist()
    finally:
        for actor in (*started, teacher):
            ray.kill(actor)
        ray.shutdown()


def _device(model: Any, mask_id: int) -> str:
    return model.device.type


def test_a_rollout_actor_that_holds_the_gpu_is_killed(gpu_cluster, wide_teacher, tmp_path) -> None:
    """By SIGKILL. Ray starts it again on the same GPU, and every sample is trained once."""
    victims, run_dir = Victims(lambda: raylets_of(gpu_cluster)), tmp_path / "run"
    with running(config_of(wide_teacher, run_dir)) as process:
        wait_for_rounds(run_dir, 1, process)
        victims.kill("rollout")
        assert process.wait(timeout=PATIENCE) == 0
    assert_sound(run_dir)
    assert [record["role"] for record in records_of(run_dir, "actor_death")] == ["rollout"]
    assert all(record["loss"] > 0 for record in records_of(run_dir, "step"))


def test_a_run_whose_driver_was_killed_is_resumed(gpu_cluster, wide_teacher, tmp_path) -> None:
    config = config_of(wide_teacher, tmp_path / "run", model={"teacher": str(wide_teacher), "dtype": "bfloat16"})
    assert run_until(config, False, 2, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(config, True, ROUNDS, signal.SIGTERM) in (0, 128 + signal.SIGTERM)
    assert_sound(tmp_path / "run")
