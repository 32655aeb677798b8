"""Who attends to whom (METHOD.md sections 1, 2, 4), once as dense booleans and once for flex_attention.

Decoder: a cached token sees every token of earlier blocks and of its own block. Training row
`[clean | noisy]`: clean tokens are block-causal among themselves; noisy block b sees the clean blocks < b and all of
noisy block b. Both follow from two numbers a token: its block and whether it is noisy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PAD_BLOCK = -1
"""Block of a padding token in a training row: nobody sees it, and it sees only itself."""


def block_causal(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """Plain block-causal mask. `[B, Q]`, `[B, T]` blocks -> `[B, 1, Q, T]` bool, True where attended."""
    return (key_blocks[:, None, :] <= query_blocks[:, :, None])[:, None]


def training_mask(blocks: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Dense mask of training rows: the oracle, and what runs on CPU.

    Args:
        blocks: `[B, T]` int64, block of each token, `PAD_BLOCK` for padding.
        noisy: `[B, T]` bool, True for the noisy copy.

    Returns: `[B, 1, T, T]` bool, True where the query (dim 2) sees the key (dim 3).
    """
    query = (blocks[:, :, None], noisy[:, :, None])
    key = (blocks[:, None, :], noisy[:, None, :])
    index = torch.arange(blocks.shape[1], device=blocks.device)
    return _visible(*query, *key, index[:, None], index[None, :])[:, None]


def training_mask_mod(blocks: torch.Tensor, noisy: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The same mask as a flex_attention `mask_mod(b, h, q, k)`; nothing of size `[T, T]` is built."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return _visible(blocks[b, q], noisy[b, q], blocks[b, k], noisy[b, k], q, k)

    return mask_mod


def _visible(
    q_block: torch.Tensor,
    q_noisy: torch.Tensor,
    k_block: torch.Tensor,
    k_noisy: torch.Tensor,
    q_index: torch.Tensor,
    k_index: torch.Tensor,
) -> torch.Tensor:
    earlier_clean = ~k_noisy & (k_block < q_block)
    same_copy_same_block = (k_noisy == q_noisy) & (k_block == q_block)
    real = (k_block != PAD_BLOCK) & (q_block != PAD_BLOCK)
    # Padding sees itself, so that no softmax is over nothing.
    return (real & (earlier_clean | same_copy_same_block)) | (q_index == k_index)
