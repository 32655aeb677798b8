"""Embedding lookup of a model whose output matrix is its embedding, with one gradient for both uses.

Autograd would make one gradient of `[V, D]` for the lookup, another for the output matrix, and add them. Here the
backward pass of the loss leaves the output matrix's gradient in a `GradientHandover`, and the backward pass of the
lookup, which comes last, adds its few rows to that.
"""

from __future__ import annotations

from typing import Any

import torch


class GradientHandover:
    """Carries the output matrix's gradient `[V, D]` from the loss's backward pass to the lookup's."""

    gradient: torch.Tensor | None = None


def embed(weight: torch.Tensor, ids: torch.Tensor, padding_id: int | None, handover: GradientHandover) -> torch.Tensor:
    """`weight[ids]`, where the gradient of `weight` includes the one in `handover`.

    Args:
        weight: `[V, D]`.
        ids: `[B, T]` int64.
        padding_id: token whose row gets no gradient from lookups, as in `torch.nn.Embedding`.
        handover: holds the output matrix's gradient when this function's backward pass runs. Whatever computes that
            gradient must therefore depend on the result of this function.

    Returns: `[B, T, D]`.
    """
    return _Embed.apply(weight, ids, padding_id, handover)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_id: int | None, handover: GradientHandover
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_id, ctx.handover = padding_id, handover
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, lookup_gradient: torch.Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        total, ctx.handover.gradient = ctx.handover.gradient, None
        if total is None:
            raise RuntimeError("the lookup's backward pass found no gradient of the output matrix to add its own to")
        # The rows of a frequent token (the mask) are summed in float32 first: bfloat16 would lose the small ones.
        tokens, places = ids.flatten().unique(return_inverse=True)
        sums = lookup_gradient.new_zeros(len(tokens), lookup_gradient.shape[-1], dtype=torch.float32)
        sums.index_add_(0, places, lookup_gradient.flatten(0, -2).float())
        if ctx.padding_id is not None:
            sums.masked_fill_((tokens == ctx.padding_id)[:, None], 0.0)
        total.index_add_(0, tokens, sums.to(total.dtype))
        return total, None, None, None
