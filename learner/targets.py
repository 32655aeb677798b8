"""The teacher's side of the loss: the targets of many trajectories at the loss positions of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.model.load import load_output_matrix
from opdlm.common.tensors import array_to_tensor
from opdlm.common.types import LogitsTargets, TeacherTargets, TopKTargets
from opdlm.learner.losses import divergence, forward_kl_with_gradient, restrict_to_top_k
from opdlm.learner.rows import Row


@dataclass(frozen=True, slots=True)
class PositionTargets:
    """Targets of one kind at N positions.

    `topk`: `values [N, K]` log-probabilities and `token_ids [N, K]`; `logits`: `values [N, V]`; `hidden`: `values
    [N, D]` and `head [V, D]`.
    """

    values: torch.Tensor
    vocab_size: int
    """The teacher's V."""
    token_ids: torch.Tensor | None = None
    head: torch.Tensor | None = None
    """The teacher's output matrix."""

    def __getitem__(self, part: slice) -> PositionTargets:
        ids = None if self.token_ids is None else self.token_ids[part]
        return PositionTargets(self.values[part], self.vocab_size, ids, self.head)

    def to(self, device: torch.device) -> PositionTargets:
        """The same targets on another device, where the head is already."""
        ids = None if self.token_ids is None else self.token_ids.to(device)
        return PositionTargets(self.values.to(device), self.vocab_size, ids, self.head)

    def losses(self, student_logits: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
        """The divergence at each position, `[N]` float32. `student_logits`: `[N, V']` with V' >= the teacher's V.

        Where the student has one row more than the teacher (its added mask token), that row is no outcome.
        """
        student = student_logits[:, : self.vocab_size].float().log_softmax(-1)
        if self.token_ids is not None:
            return divergence(*restrict_to_top_k(self.token_ids, self.values, student, objective.tail), objective)
        with torch.no_grad():
            teacher = self._teacher_logits().log_softmax(-1)
        if objective.top_k == 0:
            return divergence(teacher, student, objective)
        top, ids = teacher.topk(min(objective.top_k, teacher.shape[-1]), dim=-1)
        return divergence(*restrict_to_top_k(ids, top, student, objective.tail), objective)

    def losses_with_gradient(
        self,
        student_logits: torch.Tensor,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
        scratch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses`, and the gradient of `sum(weights * losses)` by the student's logits, `[N, V']` float32.

        Runs outside autograd and may overwrite the student's logits. The forward KL over the full vocabulary, the
        usual case, is computed in closed form and in place; autograd computes all other cases.

        Args:
            weights: `[N]` float32.
            scratch: memory for the teacher's logits, from `scratch_for`.
        """
        is_forward_kl = objective.divergence == "kl" and objective.reverse_weight == 0
        if is_forward_kl and objective.top_k == 0 and self.token_ids is None:
            outcomes = student_logits[:, : self.vocab_size].float()
            added_rows = student_logits.shape[1] - self.vocab_size
            losses, gradient = forward_kl_with_gradient(self._teacher_logits(scratch), outcomes, weights)
            return losses, torch.nn.functional.pad(gradient, (0, added_rows)) if added_rows else gradient
        with torch.enable_grad():
            logits = student_logits.detach().float().requires_grad_()
            losses = self.losses(logits, objective)
            (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
        return losses.detach(), gradient

    def scratch_for(self, positions: int) -> torch.Tensor | None:
        """Memory for the teacher's logits of one chunk, which all chunks may use in turn; None where it is of no use.

        On a CPU, touching fresh memory of that size takes longer than the arithmetic on it.

        Args:
            positions: positions in a chunk.
        """
        if self.head is None or self.head.dtype is not torch.float32:
            return None
        return self.head.new_empty(positions, self.vocab_size)

    def _teacher_logits(self, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, V]` float32, in memory that the caller may overwrite. Top-K targets have none."""
        if self.head is None:
            return self.values.to(torch.float32, copy=True)
        values = self.values.to(self.head.dtype)
        if scratch is not None:
            return torch.mm(values, self.head.T, out=scratch[: len(values)])
        return (values @ self.head.T).float()


def gather_targets(
    rows: Sequence[Row], teacher_head: torch.Tensor | None, objective: ObjectiveConfig
) -> PositionTargets:
    """The targets at the loss positions of the rows, in their order.

    Args:
        teacher_head: the teacher's output matrix `[V, D]`, for hidden-state targets.

    Raises:
        ValueError: hidden-state targets without the teacher's output matrix.
    """
    parts = [(row.scored.targets, row.loss_positions) for row in rows]
    first = parts[0][0]
    if isinstance(first, TopKTargets):
        keep = slice(0, objective.top_k or None)
        ids = _concatenate(parts, "token_ids").to(torch.int64)[:, keep]
        return PositionTargets(_concatenate(parts, "logprobs")[:, keep], first.vocab_size, ids)
    if isinstance(first, LogitsTargets):
        return PositionTargets(_concatenate(parts, "logits"), first.logits.shape[-1])
    if teacher_head is None:
        raise ValueError("hidden-state targets need the teacher's output matrix on the learner; found none")
    return PositionTargets(_concatenate(parts, "hidden"), teacher_head.shape[0], head=teacher_head)


def _concatenate(parts: Sequence[tuple[TeacherTargets, np.ndarray]], field: str) -> torch.Tensor:
    return array_to_tensor(np.concatenate([getattr(targets, field)[positions] for targets, positions in parts]))


def load_teacher_head(config: OpdlmConfig, device: torch.device) -> torch.Tensor | None:
    """The teacher's output matrix `[V, D]` where the run's targets are hidden states, else None."""
    if config.teacher.targets != "hidden" or config.objective.kind == "cft":
        return None
    return load_output_matrix(config.model.teacher, config.teacher.dtype).to(device)
