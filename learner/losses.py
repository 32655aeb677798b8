"""Divergences between teacher and student at single positions (METHOD.md section 5).

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py ->
actors/rollout/decoder.py -> actors/teacher/scoring.py -> actors/queue/rules.py -> learner/train_step.py -> this file.
The step's forward (`distill.py`) ends in `chunked_loss.py`, which takes a few positions at a time; `targets.py` gives
the functions below the teacher's distributions at these positions beside the student's.

A divergence takes two `[N, C]` float32 arrays of log-probabilities over the same C outcomes, and gives `[N]` nats. A
teacher probability of exactly 0 contributes 0 to the forward KL, never a NaN. `restrict_to_top_k` makes the outcomes
the teacher's K likeliest tokens; `forward_kl_with_gradient` is the usual loss with its gradient in closed form.
"""

from __future__ import annotations

import torch

from opdlm.common.config.schema import ObjectiveConfig

_LOG_TINY = -87.3
"""log of the smallest normal float32. Stands in for the teacher's log 0 where the student's probability is multiplied
with it."""

_ROWS_IN_CACHE = 8
"""Rows of a large vocabulary that a CPU's cache holds."""


def divergence(teacher: torch.Tensor, student: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """The divergence that the run file asks for: JSD, or forward and reverse KL in a weighted mix."""
    if objective.divergence == "jsd":
        return jensen_shannon(teacher, student, objective.jsd_alpha)
    weight = objective.reverse_weight
    if weight == 0.0:
        return forward_kl(teacher, student)
    if weight == 1.0:
        return reverse_kl(teacher, student)
    return (1 - weight) * forward_kl(teacher, student) + weight * reverse_kl(teacher, student)


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student)."""
    p = teacher.exp()
    return torch.where(p > 0, p * (teacher.masked_fill(p == 0, 0.0) - student), 0.0).sum(-1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher). Finite: the teacher's log-probabilities are raised to -87.3 at least."""
    return (student.exp() * (student - teacher.clamp(min=_LOG_TINY))).sum(-1)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, alpha: float) -> torch.Tensor:
    """`alpha KL(teacher || m) + (1 - alpha) KL(student || m)` with `m = alpha teacher + (1 - alpha) student`."""
    log_alpha = torch.tensor(alpha, dtype=teacher.dtype, device=teacher.device).log()
    log_rest = torch.tensor(1 - alpha, dtype=teacher.dtype, device=teacher.device).log()
    mixture = torch.logaddexp(teacher.clamp(min=_LOG_TINY) + log_alpha, student + log_rest)
    return alpha * forward_kl(teacher, mixture) + (1 - alpha) * (student.exp() * (student - mixture)).sum(-1)


def restrict_to_top_k(
    teacher_ids: torch.Tensor, teacher_top: torch.Tensor, student: torch.Tensor, tail: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of teacher and student over the teacher's top K tokens alone.

    Args:
        teacher_ids: `[N, K]` int64, the teacher's top tokens.
        teacher_top: `[N, K]`, their log-probabilities under the teacher's full-vocabulary softmax.
        student: `[N, V]` log-probabilities.
        tail: `drop` leaves the remaining mass out, so a divergence may be negative; `bucket` appends it to both as
            one more outcome.

    Returns: (the teacher's, the student's), `[N, K]`, or `[N, K + 1]` with `bucket`.
    """
    student_top = student.gather(-1, teacher_ids)
    if tail == "drop":
        return teacher_top, student_top
    return _with_bucket(teacher_top), _with_bucket(student_top)


def _with_bucket(top: torch.Tensor) -> torch.Tensor:
    # Where the mass rounds to 1 in float32, 1 - mass has no correct digit. So the remaining mass is 1e-7 at least, in
    # both models alike: the divergence of equal models stays 0, and the student's gradient stays finite.
    mass = top.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([top, torch.log(-torch.expm1(mass))], dim=-1)


def forward_kl_with_gradient(
    teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) from logits, and the gradient of `sum(weights * KL)` by the student's logits.

    With p the teacher's distribution and q the student's, the gradient is exactly `weights * (q - p)`. Both logits are
    overwritten; the gradient is returned in the memory of the student's.

    Args:
        teacher, student: logits, `[N, C]` float32.
        weights: `[N]` float32.

    Returns: (the KL `[N]` in nats, the gradient `[N, C]`).
    """
    losses = torch.empty_like(weights)
    # On a CPU a few rows at a time, which stay in its cache from one operation to the next; on a GPU all at once.
    rows = _ROWS_IN_CACHE if teacher.device.type == "cpu" else max(len(teacher), 1)
    for part in (slice(start, start + rows) for start in range(0, len(teacher), rows)):
        t, s = teacher[part], student[part]
        log_p = t.sub_(t.logsumexp(-1, keepdim=True)).clamp_(min=-1e30)  # p = 0 times a finite number is 0
        log_q = s.sub_(s.logsumexp(-1, keepdim=True))
        log_ratio = log_p - log_q
        p = log_p.exp_()
        losses[part] = torch.linalg.vecdot(p, log_ratio)
        log_q.exp_().sub_(p).mul_(weights[part, None])
    return losses, student
