"""An attention function for transformers models, registered under `ATTENTION`, that lets the caller compute attention.

A caller that can compute attention with less work than a dense mask would need passes an `AttentionLayout` to the
model's forward (`hidden_states(..., layout=...)`), and each layer then calls it. Without a layout, the function is
transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "opdlm"
"""Name of the attention function, for `set_attn_implementation`."""


class AttentionLayout(Protocol):
    """Knows how the tokens of a forward attend to each other, and computes their attention."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Computes the attention of one layer.

        Args:
            query: `[B, H, T, D]`.
            key, value: `[B', H', T', D]`, where H' divides H.
            mask: the mask that the forward was given, or None.
            scale: factor of the scores.

        Returns: `[B, T, H, D]`.
        """
        ...


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: AttentionLayout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers calls this for each layer; `layout` comes from the keyword arguments of the model's forward."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return layout.attend(query, key, value, attention_mask, scaling), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
