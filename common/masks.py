"""Attention masks (METHOD.md sections 1, 2, 4), as dense booleans and as a `mask_mod` of flex_attention.

In the decoder, a token sees every token of earlier blocks and of its own block. In a training row `[clean | noisy]`,
clean tokens are block-causal among themselves, and noisy block b sees the clean blocks before b and all of noisy block
b. A line of a micro-batch may hold several such rows, and several noisy copies may follow one clean half. The mask of a
line follows from three numbers of each token: its sample, its copy (0 is the clean one), and its block.

With causal context (`common/form.py`), clean tokens are causal among themselves, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

TokenPlaces = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Sample, copy and block of each token, and its index in the line; int64."""

PADDING = -1
"""The sample of a padding token, which sees itself only and is seen by no other token."""


def block_causal(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """Returns the block-causal mask.

    Args:
        query_blocks: `[B, Q]` int64, block of each query token.
        key_blocks: `[B, T]` int64, block of each key token.

    Returns: `[B, 1, Q, T]` bool, True where the query sees the key.
    """
    return (key_blocks[:, None, :] <= query_blocks[:, :, None])[:, None]


def training_mask(
    samples: torch.Tensor, copies: torch.Tensor, blocks: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    """Returns the dense mask of lines of training rows; every other form of the mask is tested against it.

    Args:
        samples: `[B, T]` int64, the sample of its line that each token belongs to; `PADDING` for a padding token.
        copies: `[B, T]` int64, 0 for a clean token, k for a token of the sample's k-th noisy copy.
        blocks: `[B, T]` int64, the block of each token.
        causal: whether clean tokens attend causally among themselves; they lie in their order in the line.

    Returns: `[B, 1, T, T]` bool, True where the query (dim 2) sees the key (dim 3).
    """
    index = torch.arange(blocks.shape[1], device=blocks.device)
    query = samples[:, :, None], copies[:, :, None], blocks[:, :, None], index[:, None]
    key = samples[:, None, :], copies[:, None, :], blocks[:, None, :], index[None, :]
    return visible(query, key, causal)[:, None]


def training_mask_mod(
    samples: torch.Tensor, copies: torch.Tensor, blocks: torch.Tensor, causal: bool = False
) -> Callable[..., torch.Tensor]:
    """Returns `training_mask` as a `mask_mod(b, h, q, k)` of flex_attention, which builds no `[T, T]` tensor.

    Args: as for `training_mask`.
    """

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        query = samples[b, q], copies[b, q], blocks[b, q], q
        return visible(query, (samples[b, k], copies[b, k], blocks[b, k], k), causal)

    return mask_mod


def visible(query: TokenPlaces, key: TokenPlaces, causal: bool) -> torch.Tensor:
    """Returns whether the query sees the key: bool, in the shape to which the tensors of both broadcast.

    Args:
        causal: whether a clean token sees only the tokens before it in its own block, and itself.
    """
    (q_sample, q_copy, q_block, q_index), (k_sample, k_copy, k_block, k_index) = query, key
    earlier_clean = (k_copy == 0) & (k_block < q_block)
    same_copy_same_block = (k_copy == q_copy) & (k_block == q_block)
    if causal:
        same_copy_same_block = same_copy_same_block & ((k_copy != 0) | (k_index <= q_index))
    same_sample = (k_sample == q_sample) & (q_sample != PADDING)
    # A padding token sees itself, because a softmax over no keys gives NaN.
    return (same_sample & (earlier_clean | same_copy_same_block)) | (q_index == k_index)
