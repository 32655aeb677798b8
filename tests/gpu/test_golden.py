"""The reference values of `tests/golden` on the GPU, in float32. `pytest tests/gpu/test_golden.py`

The models' heads are 8 wide, so attention is that of `row_attention.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import DEVICE, NEEDS_GPU
from tests.test_golden import (  # noqa: F401  # pytest finds them here, with this file's device
    student,
    teacher,
    test_decoded_tokens_and_reveal_steps,
    test_loss_and_gradients,
    test_policy_gradient,
)

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device(DEVICE)
