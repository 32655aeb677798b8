"""The module that DeepSpeed trains: rows in, weighted sum of losses out, and no tensor `[B, P+2R, V]` on the way.

Hidden states are gathered at the loss positions first. The output matrix is then applied to `logits_chunk` positions
at a time, and each chunk's logits become a part of the gradients before the next ones are computed
(`chunked_loss.py`). So memory does not grow with V x R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.model.adapters import add_adapters, has_noisy_adapters
from opdlm.common.model.attention import ATTENTION
from opdlm.common.model.config import head_width, read_config
from opdlm.common.model.load import hidden_states, load_model
from opdlm.learner.chunked_loss import chunked_loss
from opdlm.learner.flex import attention_for, block_mask
from opdlm.learner.packing import MicroBatch
from opdlm.learner.policy_gradient import PolicyPositions
from opdlm.learner.row_attention import RowParts
from opdlm.learner.targets import PositionTargets
from opdlm.learner.tied_embedding import GradientHandover, embed


class DistillModule(nn.Module):
    """A student and its objective.

    Args:
        student: causal LM of transformers.
        objective: divergence, top-K, tail.
        logits_chunk: loss positions whose logits exist at one time.
        attention: `sdpa` (in two parts, `row_attention.py`) or `flex_attention` (block mask, GPU).
        form: the student's; its logit shift is in the rows.
    """

    def __init__(
        self,
        student: Any,
        objective: ObjectiveConfig,
        logits_chunk: int,
        attention: str = "sdpa",
        form: StudentForm = PAPER_FORM,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.logits_chunk = logits_chunk
        self.attention = attention
        self.form = form
        self.padding = 0
        """Places of padding in the attention of the last forward; 0 with flex_attention, which pads nothing."""
        if attention == "sdpa":
            student.set_attn_implementation(ATTENTION)

    @classmethod
    def load(cls, folder: str, config: OpdlmConfig, form: StudentForm) -> DistillModule:
        """Loads a student as the run file asks for it: dtype, attention, adapters, gradient checkpointing."""
        attention = attention_for(config, head_width(read_config(folder)))
        student = load_model(folder, config.model.dtype, attention)
        lora = config.model.lora
        if lora is not None and lora.tokens == "noisy" and not has_noisy_adapters(student):
            raise OpdlmError(f"model folder {folder}: it has no adapters on noisy tokens (model.lora.tokens `noisy`)")
        if lora is not None and lora.tokens == "all":
            add_adapters(student, lora, config.run.seed)
        if config.learner.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(student, config.objective, config.learner.logits_chunk, attention, form)

    def forward(
        self, batch: MicroBatch, targets: PositionTargets | PolicyPositions, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch.

        Args:
            targets: the teacher's, or the policy gradient's side, at the batch's N loss positions.
            weights: `[N]` float32, the weight of each loss position.

        Returns: (sum of weight x divergence, a float32 scalar; the divergences `[N]`, detached).
        """
        # The matrix is used without calling its module: ZeRO-3 gathers at each call, and ranks differ in their number
        # of chunks.
        matrix, embedding = self.student.lm_head.weight, self.student.get_input_embeddings()
        handover: GradientHandover | None = None
        tokens: dict[str, Any] = {"input_ids": batch.input_ids}
        if matrix is embedding.weight and matrix.requires_grad:
            handover = GradientHandover()
            looked_up = embed(matrix, batch.input_ids, embedding.padding_idx, handover)
            tokens = {"input_ids": None, "inputs_embeds": looked_up}
        mask, attention_arguments = self._mask(batch)
        hidden = hidden_states(
            self.student,
            position_ids=batch.position_ids,
            mask=mask,
            noisy=batch.copies > 0,
            **tokens,
            **attention_arguments,
        )
        hidden = hidden[batch.loss_line, batch.loss_column]
        return chunked_loss(hidden, matrix, targets, weights, self.objective, self.logits_chunk, handover)

    def _mask(self, batch: MicroBatch) -> tuple[Any, dict[str, Any]]:
        """The mask, and the further arguments of the attention function."""
        if self.attention != "flex_attention":
            dtype = self.student.dtype
            if batch.input_ids.is_cpu and dtype is torch.bfloat16:
                dtype = torch.float32  # a CPU's backward pass of attention is more than twice as fast in it
            parts = RowParts.from_batch(batch, dtype, self.form.causal)
            self.padding = parts.padding
            return parts.clean_pieces[0].mask, {"layout": parts}  # any mask: with one, the model makes none itself
        return block_mask(batch, self.form.causal), {}
