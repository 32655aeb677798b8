"""Divergences between teacher and student at single positions (METHOD.md section 5).

All functions take log-probabilities over the same C outcomes, `[N, C]` float32, and return `[N]` nats. A teacher
probability of exactly 0 contributes 0 to the forward KL and never makes a NaN.
"""

from __future__ import annotations

import torch

from opdlm.common.config.schema import ObjectiveConfig

_ROWS_IN_CACHE = 8

_LOG_TINY = -87.3
"""log of the smallest normal float32. Stands in for log 0 of the teacher where the student's mass multiplies it."""


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student)."""
    p = teacher.exp()
    return torch.where(p > 0, p * (teacher.masked_fill(p == 0, 0.0) - student), 0.0).sum(-1)


def forward_kl_with_gradient(
    teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) from logits, and the gradient of `sum(weights * KL)` with regard to the student's.

    With p and q the two distributions the gradient is `weights * (q - p)`, exactly. Both arguments are overwritten;
    the gradient is in the student's memory.

    Args:
        teacher, student: logits, `[N, C]` float32.
        weights: `[N]` float32.

    Returns: (`[N]` nats; `[N, C]`).
    """
    losses = torch.empty_like(weights)
    # A few rows at a time stay in a CPU's cache from one operation to the next; a GPU wants all of them.
    rows = _ROWS_IN_CACHE if teacher.device.type == "cpu" else max(len(teacher), 1)
    for part in (slice(start, start + rows) for start in range(0, len(teacher), rows)):
        t, s = teacher[part], student[part]
        log_p = t.sub_(t.logsumexp(-1, keepdim=True)).clamp_(min=-1e30)  # p = 0 times a finite number is 0
        log_q = s.sub_(s.logsumexp(-1, keepdim=True))
        ratio = log_p - log_q
        p = log_p.exp_()
        losses[part] = torch.linalg.vecdot(p, ratio)
        log_q.exp_().sub_(p).mul_(weights[part, None])
    return losses, student


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher); the teacher's log-probabilities are cut off at log 1e-38, so it is finite."""
    return (student.exp() * (student - teacher.clamp(min=_LOG_TINY))).sum(-1)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, alpha: float) -> torch.Tensor:
    """`alpha KL(teacher || m) + (1 - alpha) KL(student || m)` with `m = alpha teacher + (1 - alpha) student`."""
    log_alpha = torch.tensor(alpha, dtype=teacher.dtype, device=teacher.device).log()
    log_rest = torch.tensor(1 - alpha, dtype=teacher.dtype, device=teacher.device).log()
    mixture = torch.logaddexp(teacher.clamp(min=_LOG_TINY) + log_alpha, student + log_rest)
    return alpha * forward_kl(teacher, mixture) + (1 - alpha) * (student.exp() * (student - mixture)).sum(-1)


def divergence(teacher: torch.Tensor, student: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """The configured divergence."""
    if objective.divergence == "jsd":
        return jensen_shannon(teacher, student, objective.jsd_alpha)
    weight = objective.reverse_weight
    if weight == 0.0:
        return forward_kl(teacher, student)
    if weight == 1.0:
        return reverse_kl(teacher, student)
    return (1 - weight) * forward_kl(teacher, student) + weight * reverse_kl(teacher, student)


def restrict_to_top_k(
    teacher_ids: torch.Tensor, teacher_top: torch.Tensor, student: torch.Tensor, tail: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models over the teacher's top tokens.

    Args:
        teacher_ids: `[N, K]` int64; teacher_top: `[N, K]` their log-probabilities, full-vocabulary softmax.
        student: `[N, V]` log-probabilities.
        tail: `drop` leaves the remaining mass out (the sum may then be negative); `bucket` appends it as one more
            outcome for both, `[N, K + 1]`.
    """
    student_top = student.gather(-1, teacher_ids)
    if tail == "drop":
        return teacher_top, student_top
    return _with_bucket(teacher_top), _with_bucket(student_top)


def _with_bucket(top: torch.Tensor) -> torch.Tensor:
    # 1 - mass has no digits left where the mass is 1 in float32, so a tail is never below 1e-7: for both models
    # alike, which keeps the divergence of equals at zero and the student's gradient finite.
    mass = top.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([top, torch.log(-torch.expm1(mass))], dim=-1)
