"""Remasking strategies: which masked positions one denoising step reveals (METHOD.md section 2).

A strategy is a function of a `DenoisingStep` and returns `[B, S]` bool. To add one: write it here, enter it in
`STRATEGIES`, and add its name to `common/config/schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """What a strategy may look at: one denoising step of a batch of blocks."""

    masked: torch.Tensor  # [B, S] bool: positions that are still masked, so can be revealed
    confidence: torch.Tensor  # [B, S] float32: unfiltered, temperature-free probability of the candidate, or of any
    static_count: torch.Tensor  # [B] int64: masks divided over the remaining steps of the block, rounded up
    threshold: torch.Tensor  # [B] float32: threshold of the dynamic strategies
    entropy_budget: float  # nats
    entropy: Callable[[], torch.Tensor]  # [B, S] float32, entropy of the predictions in nats; computed when called
    noise: Callable[[], torch.Tensor]  # [B, S] float64 uniform numbers in [0, 1); drawn when called


def low_confidence_static(step: DenoisingStep) -> torch.Tensor:
    """The k most confident positions."""
    return _highest(step.confidence, step)


def low_confidence_dynamic(step: DenoisingStep) -> torch.Tensor:
    """Every position more confident than the threshold, never fewer than the static k."""
    return _above(step) | low_confidence_static(step)


def entropy_bounded(step: DenoisingStep) -> torch.Tensor:
    """Positions in order of rising entropy while the running sum stays inside the budget; at least one."""
    entropy = step.entropy().masked_fill(~step.masked, float("inf"))
    ordered, order = entropy.sort(dim=-1, stable=True)
    inside = ordered.cumsum(dim=-1) <= step.entropy_budget
    inside[:, 0] = True
    return torch.zeros_like(step.masked).scatter(-1, order, inside) & step.masked


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the softmax in nats: `[..., V]` float32 logits, minus infinity for impossible tokens -> `[...]`."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(dim=-1)


def sequential(step: DenoisingStep) -> torch.Tensor:
    """The k leftmost masked positions."""
    positions = torch.arange(step.masked.shape[1], device=step.masked.device)
    return _highest(-positions.expand_as(step.masked).float(), step)


def sequential_dynamic(step: DenoisingStep) -> torch.Tensor:
    """Every position more confident than the threshold, and the k leftmost.

    Not in the paper. Targets are next-token distributions behind a prefix (METHOD.md section 3), so a student learns
    nothing about a place from the tokens behind it. Where no position is confident, the leftmost is the one whose
    prefix is known; the most confident may be a later one, whose word then stands before it is known what leads to it.
    """
    return _above(step) | sequential(step)


def random(step: DenoisingStep) -> torch.Tensor:
    """k masked positions, drawn uniformly."""
    return _highest(step.noise(), step)


STRATEGIES: dict[str, Callable[[DenoisingStep], torch.Tensor]] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "entropy_bounded": entropy_bounded,
    "sequential": sequential,
    "sequential_dynamic": sequential_dynamic,
    "random": random,
}


def _above(step: DenoisingStep) -> torch.Tensor:
    """The masked positions more confident than the threshold."""
    return step.masked & (step.confidence > step.threshold[:, None])


def _highest(score: torch.Tensor, step: DenoisingStep) -> torch.Tensor:
    """The `static_count` masked positions with the highest scores."""
    order = score.masked_fill(~step.masked, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < step.static_count[:, None]) & step.masked
