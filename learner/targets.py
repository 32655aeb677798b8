"""The teacher's side of the loss: targets of many trajectories, gathered at the loss positions of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.tensors import array_to_tensor
from opdlm.common.types import LogitsTargets, TeacherTargets, TopKTargets
from opdlm.learner.losses import divergence, forward_kl_with_gradient, restrict_to_top_k
from opdlm.learner.rows import Row


@dataclass(frozen=True, slots=True)
class PositionTargets:
    """Targets at N positions, of one kind.

    `topk`: `values [N, K]` log-probabilities and `token_ids [N, K]`; `logits`: `values [N, V]`; `hidden`: `values
    [N, D]` and `head [V, D]`, the teacher's output matrix.
    """

    values: torch.Tensor
    vocab_size: int
    """The teacher's V."""
    token_ids: torch.Tensor | None = None
    head: torch.Tensor | None = None

    def __getitem__(self, part: slice) -> PositionTargets:
        ids = None if self.token_ids is None else self.token_ids[part]
        return PositionTargets(self.values[part], self.vocab_size, ids, self.head)

    def to(self, device: torch.device) -> PositionTargets:
        """The same targets on another device (the head is already there)."""
        ids = None if self.token_ids is None else self.token_ids.to(device)
        return PositionTargets(self.values.to(device), self.vocab_size, ids, self.head)

    def losses(self, student_logits: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
        """Divergence at each position, `[N]` float32. `student_logits`: `[N, V']`, V' >= the teacher's V.

        Where the student has a row more than the teacher (its added mask token), that row is no outcome.
        """
        student = student_logits[:, : self.vocab_size].float().log_softmax(-1)
        if self.token_ids is not None:
            return divergence(*restrict_to_top_k(self.token_ids, self.values, student, objective.tail), objective)
        with torch.no_grad():
            teacher = self._logits().log_softmax(-1)
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
        """`losses`, and the gradient of `sum(weights * losses)` with regard to the logits, `[N, V']` float32.

        Outside autograd. The logits may be overwritten. The forward KL over the full vocabulary, the usual case, has a
        closed form in place; for all others autograd does it.

        Args:
            scratch: of `scratch_for`, for the teacher's logits.
        """
        forward = objective.divergence == "kl" and objective.reverse_weight == 0
        if forward and objective.top_k == 0 and self.token_ids is None:
            outcomes, more = student_logits[:, : self.vocab_size].float(), student_logits.shape[1] - self.vocab_size
            losses, gradient = forward_kl_with_gradient(self._logits(scratch), outcomes, weights)
            return losses, torch.nn.functional.pad(gradient, (0, more)) if more else gradient
        with torch.enable_grad():
            logits = student_logits.detach().float().requires_grad_()
            losses = self.losses(logits, objective)
            (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
        return losses.detach(), gradient

    def scratch_for(self, positions: int) -> torch.Tensor | None:
        """Memory that chunks of so many positions may use one after the other; None where it would not help.

        Fresh memory of that size costs a CPU more than the arithmetic on it.
        """
        if self.head is None or self.head.dtype is not torch.float32:
            return None
        return self.head.new_empty(positions, self.vocab_size)

    def _logits(self, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """The teacher's, `[N, V]` float32, a tensor that the caller may overwrite. Not for top-K targets."""
        if self.head is None:
            return self.values.to(torch.float32, copy=True)
        values = self.values.to(self.head.dtype)
        if scratch is not None:
            return torch.mm(values, self.head.T, out=scratch[: len(values)])
        return (values @ self.head.T).float()


def gather_targets(
    rows: Sequence[Row], teacher_head: torch.Tensor | None, objective: ObjectiveConfig
) -> PositionTargets:
    """Targets at the loss positions of the rows, in their order.

    Raises:
        ValueError: hidden targets without the teacher's output matrix.
    """
    parts = [(row.scored.targets, row.loss_positions) for row in rows]
    first = parts[0][0]
    if isinstance(first, TopKTargets):
        keep = slice(0, objective.top_k or None)
        ids = _stack(parts, "token_ids").to(torch.int64)[:, keep]
        return PositionTargets(_stack(parts, "logprobs")[:, keep], first.vocab_size, ids)
    if isinstance(first, LogitsTargets):
        return PositionTargets(_stack(parts, "logits"), first.logits.shape[-1])
    if teacher_head is None:
        raise ValueError("hidden targets need the teacher's output matrix on the learner")
    return PositionTargets(_stack(parts, "hidden"), teacher_head.shape[0], head=teacher_head)


def _stack(parts: Sequence[tuple[TeacherTargets, np.ndarray]], field: str) -> torch.Tensor:
    return array_to_tensor(np.concatenate([getattr(targets, field)[positions] for targets, positions in parts]))
