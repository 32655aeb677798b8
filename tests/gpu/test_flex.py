"""flex_attention, forward and backward, against the learner's attention on the CPU. `pytest tests/gpu/test_flex.py`"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.types import HiddenTargets, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import MicroBatch, pack
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import PositionTargets, gather_targets
from tests.gpu import DEVICE, EXACT, HALF, ONLY_GPU, relative
from tests.tiny import MASK, tiny_model, trajectory

pytestmark = ONLY_GPU  # it has no backward pass on the CPU

OBJECTIVE = ObjectiveConfig(exclude_eos=False)
SHAPES = [(2, 40), (3, 200), (1, 8), (5, 64), (1, 400), (4, 12), (7, 100), (2, 333)]
"""Micro-batches of so many trajectories of so many response tokens."""
MODELS = {
    "grouped heads": {"hidden_size": 32, "head_dim": 32},
    "nine heads of 64, three for keys": {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 9}
    | {"num_key_value_heads": 3},  # SmolLM2's
    "heads of 128": {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tied": {"hidden_size": 32, "head_dim": 16, "tied": True},
}


@pytest.fixture(autouse=True)
def apart() -> None:
    """Nothing compiled is left of an earlier test."""
    torch._dynamo.reset()


def micro_batch(count: int, response: int, width: int, form: StudentForm) -> tuple[MicroBatch, PositionTargets]:
    rng, rows = np.random.default_rng([count, response]), []
    for _ in range(count):
        steps = [int(step) for block in range(-(-response // 4)) for step in 4 * block + 1 + rng.permutation(4)]
        one = trajectory(list(rng.integers(3, 30, 7)), list(rng.integers(3, 30, response)), steps[:response])
        hidden = HiddenTargets(rng.standard_normal((one.response_length, width), dtype=np.float32))
        rows += build_rows(ScoredTrajectory(one, hidden), BlockGrid(4, "response"), OBJECTIVE, MASK, rng, form)
    head = tiny_model(1, hidden_size=width).lm_head.weight.detach()
    return pack(rows), gather_targets(rows, head, OBJECTIVE)


def loss_and_gradients(module: DistillModule, batch: MicroBatch, targets: PositionTargets) -> list[torch.Tensor]:
    """The losses `[N]`, then the gradients of all parameters."""
    device = module.student.device
    targets = targets.to(device)
    targets = PositionTargets(targets.values, targets.vocab_size, head=targets.head.to(device), holes=targets.holes)
    module.zero_grad()
    count = len(batch.loss_row)
    total, losses = module(batch.to(device), targets, torch.full((count,), 1 / count, device=device))
    total.backward()
    return [losses, *(p.grad.clone() for p in module.parameters())]


def modules(model, form: StudentForm, dtype=torch.float32) -> tuple[DistillModule, DistillModule]:
    """On the CPU in float32, and on the GPU with flex_attention."""
    flexible = copy.deepcopy(model).to(DEVICE, dtype)
    flexible.set_attn_implementation("flex_attention")
    return (
        DistillModule(model.train(), OBJECTIVE, 16, form=form),
        DistillModule(flexible.train(), OBJECTIVE, 16, "flex_attention", form),
    )


@pytest.mark.parametrize("form", [PAPER_FORM, StudentForm(True, "causal")], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_cpu(name, form) -> None:
    """Losses and every gradient, in micro-batches of shapes that come in turn."""
    model = tiny_model(3, **MODELS[name])
    on_cpu, on_gpu = modules(model, form)
    for count, response in SHAPES:
        batch, targets = micro_batch(count, response, model.config.hidden_size, form)
        expected, found = (loss_and_gradients(module, batch, targets) for module in (on_cpu, on_gpu))
        for ours, reference in zip(found, expected, strict=True):
            assert relative(ours, reference) < EXACT, (count, response)


def test_bfloat16() -> None:
    """Losses within 2e-2 of float32; gradients point the same way, cosine above 0.99."""
    model = tiny_model(3, **MODELS["grouped heads"])
    on_cpu, on_gpu = modules(model.to(torch.bfloat16).float(), PAPER_FORM, torch.bfloat16)
    batch, targets = micro_batch(4, 64, model.config.hidden_size, PAPER_FORM)
    (reference, *expected), (ours, *found) = (loss_and_gradients(m, batch, targets) for m in (on_cpu, on_gpu))
    assert relative(ours, reference) < HALF
    ours, reference = (torch.cat([g.cpu().float().flatten() for g in parts]) for parts in (found, expected))
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=0) > 0.99


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_model(3, **MODELS["grouped heads"])
    _, plain = modules(model, PAPER_FORM)
    _, checkpointed = modules(model, PAPER_FORM)
    checkpointed.student.gradient_checkpointing_enable({"use_reentrant": False})
    batch, targets = micro_batch(3, 60, model.config.hidden_size, PAPER_FORM)
    expected, found = (loss_and_gradients(module, batch, targets) for module in (plain, checkpointed))
    for ours, reference in zip(found, expected, strict=True):
        assert relative(ours, reference) < EXACT


def test_shapes_in_turn_need_few_compilations() -> None:
    """Each compilation takes many seconds, and beyond torch's limit there is no kernel at all."""
    model = tiny_model(3, **MODELS["grouped heads"])
    _, module = modules(model, PAPER_FORM)
    torch._dynamo.utils.counters.clear()
    for count, response in SHAPES:
        loss_and_gradients(module, *micro_batch(count, response, model.config.hidden_size, PAPER_FORM))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 8, "of masks and of attention"
