"""The loss at many positions and its gradients, with the logits of only a few positions in memory at a time.

The losses are `divergence(targets, hidden @ matrix.T)`, and what is trained is the scalar `sum(weights * losses)`. The
gradient of a chunk's logits is taken in the forward pass, while they exist, and becomes at once a part of the
gradients of the hidden states and of the output matrix. So no logits are kept for the backward pass, and none are
computed twice. What is kept has the size of the hidden states and the matrix, however many positions there are.

The tests compare this with the same sum through `PositionTargets.losses` and autograd, in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.learner.packing import LINE_MULTIPLE
from opdlm.learner.policy_gradient import PolicyPositions
from opdlm.learner.targets import PositionTargets
from opdlm.learner.tied_embedding import GradientHandover


def chunked_loss(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    targets: PositionTargets | PolicyPositions,
    weights: torch.Tensor,
    objective: ObjectiveConfig,
    chunk: int,
    handover: GradientHandover | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the divergences; it allows one backward pass.

    Args:
        hidden: `[N, D]` final hidden states at the loss positions.
        matrix: `[V', D]` the student's output matrix.
        targets: the teacher's, or the policy gradient's side, at the same N positions.
        weights: `[N]` float32, the weight of each position.
        chunk: positions whose logits exist at one time.
        handover: takes the matrix's gradient in the backward pass; without one, autograd does.

    Returns: (the sum, a float32 scalar; the divergences `[N]` float32, detached from the graph).
    """
    return _ChunkedLoss.apply(hidden, matrix, targets, weights, objective, chunk, handover)


def parts_of(positions: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` that hold all loss positions.

    Fewer than `LINE_MULTIPLE` at the end are a part of their own: a CPU makes kernels for each number of positions, and
    keeps them.
    """
    whole = positions - positions % LINE_MULTIPLE
    for first, end in ((0, whole), (whole, positions)):
        for start in range(first, end, chunk):
            yield slice(start, min(start + chunk, end))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        matrix: torch.Tensor,
        targets: PositionTargets | PolicyPositions,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
        chunk: int,
        handover: GradientHandover | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        matrix_gradient = torch.empty_like(matrix) if ctx.needs_input_grad[1] else None
        if matrix_gradient is not None and not len(hidden):
            matrix_gradient.zero_()  # an empty batch needs a gradient too: every ZeRO rank must have one
        positions = min(chunk, len(hidden))
        memory, scratch = hidden.new_empty(positions, len(matrix)), targets.scratch_for(positions)
        for part in parts_of(len(hidden), chunk):
            logits = torch.mm(hidden[part], matrix.T, out=memory[: len(hidden[part])])
            losses[part], logits_gradient = targets[part].losses_with_gradient(
                logits, weights[part], objective, scratch
            )
            logits_gradient = logits_gradient.to(matrix.dtype)
            if hidden_gradient is not None:
                torch.mm(logits_gradient, matrix, out=hidden_gradient[part])
            if matrix_gradient is not None:
                # The first chunk overwrites: filling so large a matrix with zeros would be one more pass over memory.
                matrix_gradient.addmm_(logits_gradient.T, hidden[part], beta=int(part.start > 0))
        ctx.handover = handover
        ctx.gradients = (hidden_gradient, matrix_gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, sum_gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss has been through its one backward pass")
        # Scaled in place: these are the largest tensors of the step, and nothing else refers to them.
        scaled = [None if gradient is None else gradient.mul_(sum_gradient) for gradient in ctx.gradients]
        ctx.gradients = None
        if ctx.handover is not None:
            ctx.handover.gradient, scaled[1] = scaled[1], None
        return (*scaled, None, None, None, None, None)
