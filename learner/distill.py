"""The module that DeepSpeed trains: rows in, weighted sum of losses out, without `[B, P+2R, V]` ever existing.

Hidden states are gathered at the loss positions first; the output matrix is then applied to `logits_chunk` positions
at a time, and each chunk's logits become a part of the gradients before the next ones are made (`chunked_loss.py`).
Memory does not grow with V x R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.masks import training_mask_mod
from opdlm.common.model.attention import NAME as ATTENTION
from opdlm.common.model.load import hidden_states
from opdlm.learner.chunked_loss import chunked_loss
from opdlm.learner.packing import MicroBatch
from opdlm.learner.row_attention import RowParts
from opdlm.learner.targets import PositionTargets
from opdlm.learner.tied_embedding import Sink, embed


class DistillModule(nn.Module):
    """A student and its objective.

    Args:
        student: causal LM of transformers.
        objective: divergence, top-K, tail.
        logits_chunk: loss positions whose logits exist at one time.
        attention: `sdpa` (in parts, `row_attention.py`) or `flex_attention` (block mask, GPU).
    """

    def __init__(self, student: Any, objective: ObjectiveConfig, logits_chunk: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.logits_chunk = logits_chunk
        self.attention = attention
        self.padding = 0
        """Places of padding in the last forward's attention; none with flex_attention, whose line has none."""
        if attention == "sdpa":
            student.set_attn_implementation(ATTENTION)

    def forward(
        self, batch: MicroBatch, targets: PositionTargets, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sum of weight x divergence, a scalar; the divergences `[N]`, detached).

        `weights`: `[N]` float32, what each loss position counts.
        """
        # The matrix, not the module: ranks differ in their number of chunks, and ZeRO-3 gathers at each module call.
        matrix, embedding = self.student.lm_head.weight, self.student.get_input_embeddings()
        if matrix is embedding.weight and matrix.requires_grad:
            sink = Sink()
            looked_up = embed(matrix, batch.input_ids, embedding.padding_idx, sink)
            source: dict[str, Any] = {"input_ids": None, "inputs_embeds": looked_up}
        else:
            sink, source = None, {"input_ids": batch.input_ids}
        mask, how = self._mask(batch)
        hidden = hidden_states(self.student, position_ids=batch.position_ids, mask=mask, **source, **how)
        hidden = hidden[batch.loss_line, batch.loss_column]
        return chunked_loss(hidden, matrix, targets, weights, self.objective, self.logits_chunk, sink)

    def _mask(self, batch: MicroBatch) -> tuple[Any, dict[str, Any]]:
        """The mask, and what else attention takes."""
        if self.attention != "flex_attention":
            parts = RowParts.of(batch, self.student.dtype)
            self.padding = parts.padding
            return parts.clean_mask, {"layout": parts}
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = batch.blocks.shape
        mask_mod = training_mask_mod(batch.samples, batch.copies, batch.blocks)
        device = str(batch.blocks.device)
        return create_block_mask(mask_mod, rows, None, length, length, device=device, _compile=True), {}
