"""How a run's samples divide into rounds and optimizer steps: pure arithmetic that every rank agrees on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Rounds of `prompts_per_round` samples (the last may be smaller), each cut into steps of `batch_size`."""

    total: int
    """Samples in the run."""
    prompts_per_round: int
    batch_size: int
    seed: int

    @property
    def rounds(self) -> int:
        """Rounds in the run."""
        return -(-self.total // self.prompts_per_round)

    def steps_before(self, round_: int) -> int:
        """Optimizer steps of all rounds before this one; with `round_ = rounds`, of the run."""
        full = -(-self.prompts_per_round // self.batch_size)
        if round_ < self.rounds or self.total % self.prompts_per_round == 0:
            return round_ * full
        return (round_ - 1) * full + -(-(self.total % self.prompts_per_round) // self.batch_size)

    def batches(self, round_: int, samples: int) -> list[np.ndarray]:
        """Places of a round's samples, shuffled and cut into batches."""
        order = np.random.default_rng([self.seed, 1, round_]).permutation(samples)
        return [order[i : i + self.batch_size] for i in range(0, samples, self.batch_size)]
