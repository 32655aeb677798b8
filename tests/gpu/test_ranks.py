"""DeepSpeed ZeRO with NCCL, one rank on one GPU, against a plain process on the CPU. `pytest tests/gpu/test_ranks.py`

NCCL refuses two ranks on one GPU, so this shows devices, dtypes and streams, not the exchange between ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from tests.gpu import ONLY_GPU
from tests.learner import zero_ranks
from tests.learner.test_zero import (  # noqa: F401  # pytest finds them here, with this file's `results`
    plain,
    plain_lora,
    plain_tied,
    test_a_policy_gradient_on_two_ranks_equals_one_plain_process,
    test_a_step_without_a_finite_gradient_is_skipped_on_every_rank,
    test_lora_on_two_ranks_equals_one_plain_process,
    test_resume_in_another_stage,
    test_resume_is_exact,
    test_two_ranks_equal_one_plain_process,
)
from tests.ports import free_ports

pytestmark = [ONLY_GPU, pytest.mark.zero]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("zero")
    mp.spawn(zero_ranks.run_rank, args=(1, port, str(folder), 1), nprocs=1)
    return torch.load(folder / "results.pt", weights_only=True)
