"""The module that DeepSpeed trains: rows in, weighted sum of losses out, without `[B, P+2R, V]` ever existing.

Hidden states are gathered at the loss positions first; the output matrix is then applied to `logits_chunk` positions
at a time, and each chunk's logits are dropped and recomputed in the backward pass. Memory does not grow with V x R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.config.schema import ObjectiveConfig
from common.masks import training_mask, training_mask_mod
from common.models import hidden_states
from learner.rows import MicroBatch
from learner.targets import PositionTargets


class DistillModule(nn.Module):
    """A student and its objective.

    Args:
        student: causal LM of transformers.
        objective: divergence, top-K, tail.
        logits_chunk: loss positions whose logits exist at one time.
        attention: `sdpa` (dense boolean mask) or `flex_attention` (block mask, GPU).
    """

    def __init__(self, student: Any, objective: ObjectiveConfig, logits_chunk: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.logits_chunk = logits_chunk
        self.attention = attention

    def forward(
        self, batch: MicroBatch, targets: PositionTargets, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sum of weight x divergence, a scalar; the divergences `[N]`, detached).

        `weights`: `[N]` float32, what each loss position counts.
        """
        hidden = hidden_states(self.student, batch.input_ids, batch.position_ids, self._mask(batch))
        hidden = hidden[batch.loss_row, batch.loss_column]
        parts = [
            checkpoint(self._losses, hidden[part], targets[part], use_reentrant=False)
            for start in range(0, max(len(hidden), 1), self.logits_chunk)
            for part in [slice(start, start + self.logits_chunk)]
        ]
        losses = torch.cat(parts)
        return (losses * weights).sum(), losses.detach()

    def _losses(self, hidden: torch.Tensor, targets: PositionTargets) -> torch.Tensor:
        # The matrix, not the module: ranks differ in their number of chunks, and ZeRO-3 gathers at each module call.
        logits = torch.nn.functional.linear(hidden, self.student.lm_head.weight)
        return targets.losses(logits, self.objective)

    def _mask(self, batch: MicroBatch) -> Any:
        if self.attention != "flex_attention":
            return training_mask(batch.blocks, batch.noisy)
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = batch.blocks.shape
        mask_mod = training_mask_mod(batch.blocks, batch.noisy)
        return create_block_mask(mask_mod, rows, None, length, length, device=str(batch.blocks.device), _compile=True)
