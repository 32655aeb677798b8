"""The teacher's side of the loss: the targets of many trajectories at the loss positions of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.model.load import load_output_matrix
from opdlm.common.tensors import array_to_tensor
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import LogitsTargets, PolicyTargets, TeacherTargets, TopKTargets
from opdlm.learner.losses import divergence, forward_kl_with_gradient, restrict_to_top_k
from opdlm.learner.rows import Row

_NO_TOKEN = -1e30
"""Logit of a row that no token has: its probability is 0 in float32."""


@dataclass(frozen=True, slots=True)
class PositionTargets:
    """Targets of one kind at N positions. V is the number of rows up to the last token, padding left out.

    `topk`: `values [N, K]` log-probabilities and `token_ids [N, K]`; `logits`: `values [N, V]`; `hidden`: `values
    [N, D]` and `head [V, D]`.
    """

    values: torch.Tensor
    vocab_size: int
    """V."""
    token_ids: torch.Tensor | None = None
    head: torch.Tensor | None = None
    """The first V rows of the teacher's output matrix."""
    holes: torch.Tensor | None = None
    """`[H]` int64, rows below V that no token has. None where there is none, which is usual."""

    def __getitem__(self, part: slice) -> PositionTargets:
        ids = None if self.token_ids is None else self.token_ids[part]
        return replace(self, values=self.values[part], token_ids=ids)

    def to(self, device: torch.device) -> PositionTargets:
        """The same targets on another device, where the head is already."""
        ids, holes = (None if tensor is None else tensor.to(device) for tensor in (self.token_ids, self.holes))
        return replace(self, values=self.values.to(device), token_ids=ids, holes=holes)

    def losses(self, student_logits: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
        """The divergence at each position, `[N]` float32. `student_logits`: `[N, V']` with V' >= V.

        The rows of the student from V on (padding, or an added mask token) are no outcome, and no hole is one.
        """
        student = self._without_holes(student_logits[:, : self.vocab_size].float()).log_softmax(-1)
        if self.token_ids is not None:
            return divergence(*restrict_to_top_k(self.token_ids, self.values, student, objective.tail), objective)
        with torch.no_grad():
            teacher = self._teacher_logits(objective.teacher_temperature).log_softmax(-1)
        if objective.top_k == 0:
            return divergence(teacher, student, objective)
        outcomes = teacher.shape[-1] - (0 if self.holes is None else len(self.holes))
        top, ids = teacher.topk(min(objective.top_k, outcomes), dim=-1)
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
            outcomes = self._without_holes(student_logits[:, : self.vocab_size].float())
            added_rows = student_logits.shape[1] - self.vocab_size
            teacher = self._teacher_logits(objective.teacher_temperature, scratch)
            losses, gradient = forward_kl_with_gradient(teacher, outcomes, weights)
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

    def _teacher_logits(self, temperature: float, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, V]` float32, divided by the temperature; the caller may overwrite them. Top-K targets have none."""
        if self.head is None:
            logits = self.values.to(torch.float32, copy=True)
        else:
            memory = None if scratch is None else scratch[: len(self.values)]
            logits = torch.mm(self.values.to(self.head.dtype), self.head.T, out=memory).float()
        return self._without_holes(logits if temperature == 1 else logits.div_(temperature))

    def _without_holes(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` that give the holes the probability 0. Finite, so that 0 times their logarithm is 0."""
        return logits if self.holes is None else logits.index_fill(1, self.holes, _NO_TOKEN)


def gather_targets(
    rows: Sequence[Row],
    teacher_head: torch.Tensor | None,
    objective: ObjectiveConfig,
    tokens: TokenIds | None = None,
) -> PositionTargets:
    """The targets at the loss positions of the rows, in their order.

    Args:
        teacher_head: the teacher's output matrix, for hidden-state targets.
        tokens: the tokens that teacher and student share. None: all rows of the teacher.

    Raises:
        ValueError: hidden-state targets without the teacher's output matrix.
    """
    parts = [(_teachers(row), row.loss_positions) for row in rows]
    first = parts[0][0]
    holes = torch.tensor(sorted(tokens.holes)) if tokens is not None and tokens.holes else None
    if isinstance(first, TopKTargets):
        size, keep = tokens.end if tokens is not None else first.vocab_size, slice(0, objective.top_k or None)
        ids = _concatenate(parts, "token_ids").to(torch.int64)[:, keep]
        return PositionTargets(_concatenate(parts, "logprobs")[:, keep], size, ids, holes=holes)
    if isinstance(first, LogitsTargets):
        logits = _concatenate(parts, "logits")
        size = tokens.end if tokens is not None else logits.shape[-1]
        return PositionTargets(logits[:, :size], size, holes=holes)
    if teacher_head is None:
        raise ValueError("hidden-state targets need the teacher's output matrix on the learner; found none")
    size = tokens.end if tokens is not None else teacher_head.shape[0]
    return PositionTargets(_concatenate(parts, "hidden"), size, head=teacher_head[:size], holes=holes)


def _teachers(row: Row) -> TeacherTargets:
    targets = row.scored.targets
    found = targets.teacher if isinstance(targets, PolicyTargets) else targets
    assert found is not None, "a teacher has scored what is distilled"
    return found


def _concatenate(parts: Sequence[tuple[TeacherTargets, np.ndarray]], field: str) -> torch.Tensor:
    return array_to_tensor(np.concatenate([getattr(targets, field)[positions] for targets, positions in parts]))


def load_teacher_head(config: OpdlmConfig, device: torch.device) -> torch.Tensor | None:
    """The teacher's output matrix `[V, D]` where the run's targets are hidden states, else None."""
    if config.teacher.targets != "hidden" or not config.objective.asks_teacher:
        return None
    return load_output_matrix(config.model.teacher, config.teacher.dtype).to(device)
