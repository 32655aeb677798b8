"""One attention function of transformers for all forwards whose structure is known: `NAME`.

A caller that knows who attends to whom better than a mask can say gives its forward a `layout`
(`hidden_states(..., layout=...)`), which then computes attention. Without one it is plain `sdpa`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "opdlm"


class Layout(Protocol):
    """How the tokens of a forward attend to each other."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """`[B, H, T, D]` queries, `[B', H', T', D]` keys and values (H' divides H) -> `[B, T, H, D]`."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; `layout` comes through the model's keyword arguments."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return layout.attend(query, key, value, attention_mask, scaling), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
