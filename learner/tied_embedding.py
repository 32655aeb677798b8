"""Embedding lookup of a model whose output matrix is its embedding, with one gradient for both uses.

Autograd would make a gradient of `[V, D]` for the lookup, another one for the output matrix, and add them. Here the
lookup's backward pass, which comes last, adds its few rows to what the output matrix's has left in a `Sink`.
"""

from __future__ import annotations

from typing import Any

import torch


class Sink:
    """Holds the output matrix's gradient `[V, D]` from its backward pass to the lookup's."""

    gradient: torch.Tensor | None = None


def embed(weight: torch.Tensor, ids: torch.Tensor, padding_id: int | None, sink: Sink) -> torch.Tensor:
    """`weight[ids]`, whose gradient of the weight contains the sink's.

    Args:
        weight: `[V, D]`.
        ids: `[B, T]` int64.
        padding_id: token whose row gets no gradient from lookups, as `torch.nn.Embedding` has it.
        sink: is filled in the backward pass before this one's, by what was computed from this function's result.
    """
    return _Embed.apply(weight, ids, padding_id, sink)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_id: int | None, sink: Sink) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_id, ctx.sink = padding_id, sink
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, of_rows: torch.Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        total, ctx.sink.gradient = ctx.sink.gradient, None
        if total is None:
            raise RuntimeError("the output matrix has left no gradient in the sink")
        # Tokens that occur often (the mask) are summed in float32 first: bfloat16 would lose their small parts.
        tokens, places = ids.flatten().unique(return_inverse=True)
        sums = of_rows.new_zeros(len(tokens), of_rows.shape[-1], dtype=torch.float32)
        sums.index_add_(0, places, of_rows.flatten(0, -2).float())
        if ctx.padding_id is not None:
            sums.masked_fill_((tokens == ctx.padding_id)[:, None], 0.0)
        total.index_add_(0, tokens, sums.to(total.dtype))
        return total, None, None, None
