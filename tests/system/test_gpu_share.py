"""A cluster that says it has GPUs which torch cannot use. `pytest tests/system/test_gpu_share.py`"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from opdlm.common.config import dump_config
from tests.conftest import cluster_of
from tests.system.runs import run_config, run_to_end

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with two GPUs that do not exist."""
    with cluster_of({"num_cpus": 8, "num_gpus": 2}) as cluster:
        yield cluster.address


@pytest.mark.parametrize(
    ("role", "setting"),
    [
        ("rollout", "gpus_per_actor"),
        ("teacher", "gpus_per_actor"),
        ("learner", "gpus_per_worker"),
    ],
)
def test_the_run_ends_with_a_line_that_names_the_process_and_the_setting(
    address, chain_teacher, tmp_path, role, setting
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(run_config(chain_teacher, tmp_path / "run")))
    done = run_to_end(file, "--set", f"{role}.{setting}=1", environment=os.environ | {"RAY_ADDRESS": address})
    assert done.returncode == 2, done.stderr
    assert f"{role}.{setting}: found 1, but torch" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
