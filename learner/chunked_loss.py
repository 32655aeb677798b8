"""The loss of many positions and its gradients, with the logits of only a few of them in memory at a time.

`losses = divergence(targets, hidden @ matrix.T)`, and the scalar that is trained is `sum(weights * losses)`. The
gradient of a chunk's logits is taken while they are there and folded at once into the gradients of the hidden states
and of the output matrix, so no logits are kept for the backward pass and none are made a second time for it. What
remains is of the size of hidden states and matrix, whatever the number of positions.

The oracle of the tests is the same sum through `PositionTargets.losses` and autograd, in one piece.
"""

from __future__ import annotations

from typing import Any

import torch

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.learner.targets import PositionTargets
from opdlm.learner.tied_embedding import Sink


def chunked_loss(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    targets: PositionTargets,
    weights: torch.Tensor,
    objective: ObjectiveConfig,
    chunk: int,
    sink: Sink | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the divergences, which may go through one backward pass.

    Args:
        hidden: `[N, D]` final hidden states at the loss positions.
        matrix: `[V', D]` the student's output matrix.
        targets: of N positions.
        weights: `[N]` float32, what each position counts.
        chunk: positions whose logits exist at one time.
        sink: gets the matrix's gradient in the backward pass, in place of autograd.

    Returns: (scalar float32; the divergences `[N]` float32, which no gradient reaches).
    """
    return _ChunkedLoss.apply(hidden, matrix, targets, weights, objective, chunk, sink)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        matrix: torch.Tensor,
        targets: PositionTargets,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
        chunk: int,
        sink: Sink | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_matrix = torch.empty_like(matrix) if ctx.needs_input_grad[1] else None
        if of_matrix is not None and not len(hidden):
            of_matrix.zero_()  # of an empty batch too: ranks of ZeRO must all have a gradient
        positions = min(chunk, len(hidden))
        memory, scratch = hidden.new_empty(positions, len(matrix)), targets.scratch_for(positions)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(hidden[part], matrix.T, out=memory[: len(hidden[part])])
            losses[part], of_logits = targets[part].losses_with_gradient(logits, weights[part], objective, scratch)
            of_logits = of_logits.to(matrix.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, matrix, out=of_hidden[part])
            if of_matrix is not None:
                # The first chunk overwrites: filling so large a matrix with zeros is a pass over memory of its own.
                of_matrix.addmm_(of_logits.T, hidden[part], beta=int(start > 0))
        ctx.sink = sink
        ctx.gradients = (of_hidden, of_matrix)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, of_sum: torch.Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss has been through its one backward pass")
        # In place: they are the largest tensors of the step, and nobody else has them.
        scaled = [None if gradient is None else gradient.mul_(of_sum) for gradient in ctx.gradients]
        ctx.gradients = None
        if ctx.sink is not None:
            ctx.sink.gradient, scaled[1] = scaled[1], None
        return (*scaled, None, None, None, None, None)
