"""Who attends to whom (METHOD.md sections 1, 2, 4), once as dense booleans and once for flex_attention.

Decoder: a cached token sees every token of earlier blocks and of its own block. Training row `[clean | noisy]`: clean
tokens are block-causal among themselves; noisy block b sees the clean blocks < b and all of noisy block b. A line of a
micro-batch may hold several such rows, and several noisy copies behind one clean half. Who sees whom follows from three
numbers a token: its sample, its copy (0 the clean one), its block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of tokens: sample, copy, block, and index in their line."""

PADDING = -1
"""Sample of a padding token: nobody sees it, and it sees only itself."""


def block_causal(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """Plain block-causal mask. `[B, Q]`, `[B, T]` blocks -> `[B, 1, Q, T]` bool, True where attended."""
    return (key_blocks[:, None, :] <= query_blocks[:, :, None])[:, None]


def training_mask(samples: torch.Tensor, copies: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Dense mask of training rows, which all others are held to.

    Args:
        samples: `[B, T]` int64, which of the line's samples a token belongs to; `PADDING` for none.
        copies: `[B, T]` int64, 0 for the clean copy of its response, k for the k-th noisy one.
        blocks: `[B, T]` int64, its block.

    Returns: `[B, 1, T, T]` bool, True where the query (dim 2) sees the key (dim 3).
    """
    index = torch.arange(blocks.shape[1], device=blocks.device)
    query = samples[:, :, None], copies[:, :, None], blocks[:, :, None], index[:, None]
    key = samples[:, None, :], copies[:, None, :], blocks[:, None, :], index[None, :]
    return visible(query, key)[:, None]


def training_mask_mod(samples: torch.Tensor, copies: torch.Tensor, blocks: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The same mask as a flex_attention `mask_mod(b, h, q, k)`; nothing of size `[T, T]` is built."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        query = samples[b, q], copies[b, q], blocks[b, q], q
        return visible(query, (samples[b, k], copies[b, k], blocks[b, k], k))

    return mask_mod


def visible(query: Numbers, key: Numbers) -> torch.Tensor:
    """Whether the query sees the key, from the numbers of both, which broadcast with each other."""
    (q_sample, q_copy, q_block, q_index), (k_sample, k_copy, k_block, k_index) = query, key
    earlier_clean = (k_copy == 0) & (k_block < q_block)
    same_copy_same_block = (k_copy == q_copy) & (k_block == q_block)
    together = (k_sample == q_sample) & (q_sample != PADDING)
    # Padding sees itself, so that no softmax is over nothing.
    return (together & (earlier_clean | same_copy_same_block)) | (q_index == k_index)
