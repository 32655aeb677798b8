"""The simplest block decoder: a static batch, one forward per denoising step, and one more to commit each block.

`tests/benchmarks/decoder.py` compares our decoder with it, and `tests/actors/rollout/test_plain_decoder.py` checks that
both decode the same tokens. It decodes greedily with `low_confidence_dynamic`, without end-of-sequence tokens, after
prompts of one length that fills whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from opdlm.common.types import RolloutRequest


@torch.inference_mode()
def plain_decode(
    model: Any, requests: Sequence[RolloutRequest], block: int, threshold: float, mask_id: int, batch_size: int
) -> list[list[int]]:
    """Decodes every request up to its limit, in batches that end with their longest response; returns the tokens."""
    responses = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        decoded = _batch(model, batch, block, threshold, mask_id)
        responses += [row[: r.max_new_tokens] for row, r in zip(decoded.tolist(), batch, strict=True)]
    return responses


def _batch(model: Any, batch: Sequence[RolloutRequest], block: int, threshold: float, mask_id: int) -> torch.Tensor:
    prompts = torch.stack([torch.from_numpy(request.prompt_ids).long() for request in batch])
    rows, length = prompts.shape
    cache = DynamicCache(config=model.config)
    blocks = torch.arange(length) // block
    visible = (blocks[None, :] <= blocks[:, None]).expand(rows, 1, -1, -1)
    model.model(input_ids=prompts, attention_mask=visible, past_key_values=cache, use_cache=True)
    done: list[torch.Tensor] = []
    for first in range(length, length + max(request.max_new_tokens for request in batch), block):
        tokens = torch.full((rows, block), mask_id)
        everything = torch.ones(rows, 1, block, first + block, dtype=torch.bool)
        positions = torch.arange(first, first + block).expand(rows, -1)

        def forward(
            ids: torch.Tensor, mask: torch.Tensor = everything, where: torch.Tensor = positions
        ) -> torch.Tensor:
            return model(
                input_ids=ids, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True
            ).logits.float()

        for step in range(block):
            masked = tokens == mask_id
            if not masked.any():
                break
            logits = forward(tokens)
            cache.crop(-block)  # removes the keys and values of the masked block
            logits[..., mask_id] = float("-inf")
            confidence, candidates = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            least = -(-masked.sum(1, keepdim=True) // (block - step))
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            revealed = masked & ((confidence > threshold) | (rank < least))
            tokens = torch.where(revealed, candidates, tokens)
        forward(tokens)
        done.append(tokens)
    return torch.cat(done, dim=1)
