"""Log-probabilities of responses under the frozen reference of `objective.kl_beta` (METHOD.md section 7).

The reference is the student as the run began. An actor of the student's kind holds it and runs the training rows of
each response, so its log-probabilities are of the very states in which the tokens were revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opdlm.common.batches import in_groups
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.types import PolicyTargets, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import pack
from opdlm.learner.policy_gradient import Draws, gather_policy, is_left_out
from opdlm.learner.rows import build_rows

_LOGITS_CHUNK = 1024
_ROWS = 16
"""Training rows in one forward."""
_REVEALED = ObjectiveConfig(kind="rl", selection="revealed")


def add_reference(
    model: Any, mask_id: int, samples: Sequence[ScoredTrajectory], grid: BlockGrid, form: StudentForm, draws: Draws
) -> tuple[list[ScoredTrajectory], None]:
    """The samples with `reference_logprobs`, which those whose group is left out do not need.

    A function for `RolloutActor.use_student`.

    Args:
        model: the reference; its parameters need no gradient afterwards.
        samples: with `PolicyTargets`.
        draws: what the rollouts were drawn from.
    """
    module = DistillModule(model.requires_grad_(False), _REVEALED, _LOGITS_CHUNK, form=form)
    device, rng = next(model.parameters()).device, np.random.default_rng(0)
    kept = [one for one in samples if not is_left_out(one)]
    found = {id(one): np.zeros(one.trajectory.response_length, dtype=np.float32) for one in kept}
    rows = [row for one in kept for row in build_rows(one, grid, _REVEALED, mask_id, rng, form)]
    with torch.no_grad():
        for group in in_groups([row for row in rows if len(row.loss_positions)], _ROWS):
            batch, positions = pack(group), gather_policy(group, draws).to(device)
            module(batch.to(device), positions, torch.zeros(len(batch.loss_row), device=device))
            logprobs = positions.new_logprobs.cpu().numpy()
            for index, row in enumerate(group):
                found[id(row.scored)][row.loss_positions] = logprobs[batch.loss_row.numpy() == index]
    return [_with_reference(one, found[id(one)]) if id(one) in found else one for one in samples], None


def _with_reference(sample: ScoredTrajectory, logprobs: np.ndarray) -> ScoredTrajectory:
    assert isinstance(sample.targets, PolicyTargets), "samples of `rl`"
    return replace(sample, targets=replace(sample.targets, reference_logprobs=logprobs))
