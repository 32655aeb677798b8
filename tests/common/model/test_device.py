"""The run file decides on which device a process works. `pytest tests/common/model/test_device.py`"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opdlm.actors.rollout.actor import RolloutActor
from opdlm.actors.teacher.actor import TeacherActor
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.device import device_for
from opdlm.learner import worker


@pytest.fixture
def a_gpu_is_seen(monkeypatch) -> None:
    """As on a machine with a GPU, whose torch would take `cuda`; nothing here could really use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("a_gpu_is_seen")
def test_the_share_decides_where_a_gpu_is_seen() -> None:
    assert (device_for(0, "x"), device_for(0.25, "x"), device_for(1, "x")) == ("cpu", "cuda", "cuda")


@pytest.mark.usefixtures("no_gpu")
def test_a_share_without_a_gpu_is_an_error_that_names_the_setting() -> None:
    assert device_for(0, "x") == "cpu"
    with pytest.raises(OpdlmError, match=r"^rollout\.gpus_per_actor: found 0\.5, but torch .* on this node"):
        device_for(0.5, "rollout.gpus_per_actor")


@pytest.mark.usefixtures("a_gpu_is_seen")
@pytest.mark.parametrize("device_map", ["none", "auto"])
def test_actors_without_a_share_stay_on_the_cpu(chain_teacher, tmp_path, device_map) -> None:
    student = str(tmp_path / "student")
    convert_checkpoint(chain_teacher, student, 4, "absolute")
    assert RolloutActor(student, "float32", 1)._model.device.type == "cpu"
    teacher = TeacherActor(str(chain_teacher), TeacherConfig(dtype="float32", device_map=device_map))
    assert teacher._backend._model.device.type == "cpu"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_actors_with_a_share_need_a_gpu(chain_teacher, tmp_path, backend) -> None:
    """Before the model is loaded."""
    with pytest.raises(OpdlmError, match=r"^rollout\.gpus_per_actor: found 1, but torch"):
        RolloutActor("no such folder", "float32", 1, gpus=1)
    with pytest.raises(OpdlmError, match=r"^--gpus-per-actor: found 1, but torch"):
        TeacherActor("none", TeacherConfig(gpus_per_actor=1, backend=backend, targets="topk"), "--gpus-per-actor")


@pytest.mark.parametrize(
    ("gpus", "backend", "expected"),
    [
        (0, "gloo", None),
        (1, "nccl", None),  # the process group is of GPUs, so each rank has one
        (1, "gloo", "learner rank 1: learner.gpus_per_worker: found 1, but torch"),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_ranks_with_a_share_need_a_gpu(monkeypatch, gpus, backend, expected) -> None:
    """Two ranks; the first one has a GPU."""

    def gather(problems: list, mine: str) -> None:
        problems[:] = [None, mine]

    monkeypatch.setattr(worker.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(worker.dist, "all_gather_object", gather)
    config = SimpleNamespace(learner=SimpleNamespace(gpus_per_worker=gpus))
    assert (worker.missing_gpu(config) or "None").startswith(expected or "None")


@pytest.mark.parametrize(("usable", "backend"), [([True, True], "nccl"), ([True, False], "gloo")])
def test_a_group_of_ranks_with_gpus(monkeypatch, usable, backend) -> None:
    """Without a GPU on each, NCCL would fail before a rank could say what is wrong."""
    from opdlm.learner.gpu_backend import GpuConfig

    config, chosen = GpuConfig(), []
    kind = config.backend_cls
    monkeypatch.setattr(kind.__base__, "on_start", lambda self, group, config: chosen.append(config.backend))
    kind().on_start(SimpleNamespace(execute=lambda function: usable), config)
    assert chosen == [backend]
