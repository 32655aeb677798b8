"""How a run's samples divide into rounds and optimizer steps: pure arithmetic that every rank agrees on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opdlm.common.config.schema import OptimizerConfig


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """Rounds of `prompts_per_round` samples (the last may be smaller), each cut into steps of `batch_size`."""

    total: int
    """Samples in the run."""
    prompts_per_round: int
    batch_size: int
    seed: int
    passes: int = 1
    """Times that a round is trained on."""

    @property
    def rounds(self) -> int:
        """Rounds in the run."""
        return -(-self.total // self.prompts_per_round)

    def steps_before(self, round_: int) -> int:
        """Optimizer steps of all rounds before this one; with `round_ = rounds`, of the run."""
        full = -(-self.prompts_per_round // self.batch_size)
        if round_ < self.rounds or self.total % self.prompts_per_round == 0:
            return self.passes * round_ * full
        return self.passes * ((round_ - 1) * full + -(-(self.total % self.prompts_per_round) // self.batch_size))

    def batches(self, round_: int, samples: int) -> Iterator[tuple[int, list[int]]]:
        """(pass, places of the round's samples) of each optimizer step; every pass has an order of its own."""
        for pass_ in range(self.passes):
            order = np.random.default_rng([self.seed, 1, round_] + [pass_] * (pass_ > 0)).permutation(samples)
            for i in range(0, samples, self.batch_size):
                yield pass_, order[i : i + self.batch_size].tolist()


def split(places: Sequence[int], work: Sequence[float], ranks: int) -> list[list[int]]:
    """Shares a batch among ranks so that none waits long for another: the largest first, each to whom it burdens least.

    No rank gets more than `ceil(len(places) / ranks)` samples: not many more micro-batches than another, either.

    Args:
        work: what each sample of the round costs, by place.
    """
    most = -(-len(places) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    burdens = [0.0] * ranks
    for place in sorted(places, key=lambda place: -work[place]):
        rank = min((r for r in range(ranks) if len(shares[r]) < most), key=lambda r: burdens[r])
        shares[rank].append(place)
        burdens[rank] += work[place]
    return shares


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
