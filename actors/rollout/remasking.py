"""Remasking strategies: which masked positions one denoising step reveals (METHOD.md section 2).

A strategy is a function of a `Step` and returns `[B, S]` bool. To add one: write it here, enter it in `STRATEGIES`,
and add its name to `common/config/schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """What a strategy may look at: one denoising step of a batch of blocks."""

    masked: torch.Tensor  # [B, S] bool: still masked, so can be revealed
    confidence: torch.Tensor  # [B, S] float32: unfiltered, temperature-free probability of the candidate
    static_count: torch.Tensor  # [B] int64: masks divided over the remaining steps of the block, rounded up
    threshold: torch.Tensor  # [B] float32: of low_confidence_dynamic
    entropy_budget: float  # nats
    entropy: Callable[[], torch.Tensor]  # [B, S] float32 of the predictions, in nats, computed when asked for
    noise: Callable[[], torch.Tensor]  # [B, S] float64 uniform numbers, drawn when asked for


def low_confidence_static(step: Step) -> torch.Tensor:
    """The k most confident positions."""
    return _highest(step.confidence, step)


def low_confidence_dynamic(step: Step) -> torch.Tensor:
    """Every position more confident than the threshold, never fewer than the static k."""
    above = step.masked & (step.confidence > step.threshold[:, None])
    return above | low_confidence_static(step)


def entropy_bounded(step: Step) -> torch.Tensor:
    """Positions in order of rising entropy while the running sum stays inside the budget; at least one."""
    entropy = step.entropy().masked_fill(~step.masked, float("inf"))
    ordered, order = entropy.sort(dim=-1, stable=True)
    inside = ordered.cumsum(dim=-1) <= step.entropy_budget
    inside[:, 0] = True
    return torch.zeros_like(step.masked).scatter(-1, order, inside) & step.masked


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """`[..., V]` float32, minus infinity where impossible -> `[...]`, in nats."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(dim=-1)


def sequential(step: Step) -> torch.Tensor:
    """The k leftmost positions."""
    positions = torch.arange(step.masked.shape[1], device=step.masked.device)
    return _highest(-positions.expand_as(step.masked).float(), step)


def random(step: Step) -> torch.Tensor:
    """k positions, uniformly."""
    return _highest(step.noise(), step)


STRATEGIES: dict[str, Callable[[Step], torch.Tensor]] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "entropy_bounded": entropy_bounded,
    "sequential": sequential,
    "random": random,
}


def _highest(score: torch.Tensor, step: Step) -> torch.Tensor:
    """The `static_count` masked positions of highest score."""
    order = score.masked_fill(~step.masked, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < step.static_count[:, None]) & step.masked
