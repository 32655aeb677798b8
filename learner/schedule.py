"""Learning rate by optimizer step: a pure function, so that resuming needs nothing but the step number."""

from __future__ import annotations

import math

from common.config.schema import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then cosine to `min_lr_ratio x lr`.

    The first step already moves: warm-up step w of W has rate `lr (w + 1) / W`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
