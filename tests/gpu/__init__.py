"""What only a GPU can show. `make test-gpu`, or `pytest tests/gpu`; skipped where torch finds no GPU.

`OPDLM_TEST_DEVICE=cpu` runs on the CPU what can run there, to try the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("OPDLM_TEST_DEVICE", "cuda")
"""The device of these tests' models."""
NEEDS_GPU = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
ONLY_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
"""Also where `OPDLM_TEST_DEVICE` is `cpu`."""
EXACT, HALF = 1e-4, 2e-2
"""Largest relative difference of norms in float32, and in bfloat16."""


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference relative to that of the reference; NaN where either has a NaN."""
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    return float((ours - reference).norm() / reference.norm())
