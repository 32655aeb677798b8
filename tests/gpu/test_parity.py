"""Train-decode parity on the GPU, by each attention of the learner. `pytest tests/gpu/test_parity.py`"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import StudentForm
from opdlm.common.model.load import hidden_states
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import MicroBatch
from tests.gpu import DEVICE, EXACT, HALF, NEEDS_GPU, relative
from tests.test_parity import both_logits
from tests.tiny import FORMS_AND_GRIDS, MASK, request, tiny_model

pytestmark = NEEDS_GPU


def by_the_learner(attention: str):
    """The training forward with one attention of the learner's module."""

    def forward(model: Any, batch: MicroBatch, form: StudentForm) -> torch.Tensor:
        student = copy.deepcopy(model)
        if attention == "flex_attention":
            student.set_attn_implementation(attention)
        module = DistillModule(student, ObjectiveConfig(), 8, attention, form)
        mask, more = module._mask(batch)
        return student.lm_head(hidden_states(student, batch.input_ids, batch.position_ids, mask, **more))

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("form", "grid"), FORMS_AND_GRIDS, ids=str)
def test_training_forward_sees_what_the_decoder_saw(form, grid, attention, dtype) -> None:
    """float32: within 1e-4 at each position, relative to the logits' size; bfloat16: 2e-2 over all of them."""
    model = tiny_model(10, hidden_size=32, head_dim=32).to(DEVICE, dtype)
    how = DecodeSettings(4, grid, "low_confidence_dynamic", 0.4, 1.0, temperature=1.0)
    requests = [request(p, i, limit, seed=5) for i, (p, limit) in enumerate([(3, 15), (8, 4), (13, 11), (1, 7)])]
    trained, decoded = both_logits(model, how, form, requests, by_the_learner(attention))
    others = torch.arange(decoded.shape[1]) != MASK
    trained, decoded = trained[:, others], decoded[:, others]
    if dtype == torch.float32:
        torch.testing.assert_close(trained, decoded, rtol=EXACT, atol=EXACT)
    else:
        assert relative(trained, decoded) < HALF
