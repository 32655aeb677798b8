"""A cluster that says it has GPUs which torch cannot use. `pytest tests/system/test_gpu_share.py`"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from opdlm.common.errors import OpdlmError
from opdlm.deploy.run.train import train
from tests.conftest import start_node
from tests.system.runs import run_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def node_with_gpus(cluster) -> Iterator[None]:
    """A node with two GPUs that do not exist."""
    node = start_node(cluster, num_cpus=4, num_gpus=2)
    yield
    cluster.remove_node(node)


@pytest.mark.parametrize(
    ("role", "setting"),
    [
        ("rollout", "gpus_per_actor"),
        ("teacher", "gpus_per_actor"),
        ("learner", "gpus_per_worker"),
    ],
)
def test_the_run_ends_with_a_line_that_names_the_process_and_the_setting(
    node_with_gpus, chain_teacher, tmp_path, role, setting
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = run_config(chain_teacher, tmp_path / "run", **{role: {setting: 1}})
    with pytest.raises(OpdlmError) as caught:
        train(config, resume=False, console=Console(quiet=True))
    assert f"{role}.{setting}: found 1, but torch" in str(caught.value)
    assert "\n" not in str(caught.value)
