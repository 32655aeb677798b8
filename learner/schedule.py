"""How a run's samples divide into rounds, optimizer steps and ranks' shares, and the learning rate of each step.

Pure arithmetic on which every rank agrees; light to import (no torch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opdlm.common.config.schema import ObjectiveConfig, OptimizerConfig
from opdlm.common.samples import SampleRef


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """Rounds of `prompts_per_round` samples (the last may be smaller), each cut into steps of `batch_size`."""

    total: int
    """Samples in the run."""
    prompts_per_round: int
    batch_size: int
    seed: int
    passes: int = 1
    """How many times each round is trained on."""

    @property
    def rounds(self) -> int:
        """Rounds in the run."""
        return -(-self.total // self.prompts_per_round)

    def steps_before(self, round_: int) -> int:
        """Optimizer steps of all rounds before this one; with `round_ = rounds`, of the whole run."""
        steps_per_round = -(-self.prompts_per_round // self.batch_size)
        if round_ < self.rounds or self.total % self.prompts_per_round == 0:
            return self.passes * round_ * steps_per_round
        last_round = -(-(self.total % self.prompts_per_round) // self.batch_size)
        return self.passes * ((round_ - 1) * steps_per_round + last_round)

    def batches(self, round_: int, samples: int) -> Iterator[tuple[int, list[int]]]:
        """(pass number from 0, places in the round of the batch's samples) for each optimizer step of a round.

        Every pass has a random order of its own. `samples`: how many samples the round has.
        """
        for pass_number in range(self.passes):
            seeds = [self.seed, 1, round_] + [pass_number] * (pass_number > 0)
            order = np.random.default_rng(seeds).permutation(samples)
            for i in range(0, samples, self.batch_size):
                yield pass_number, order[i : i + self.batch_size].tolist()


@dataclass(slots=True)
class Progress:
    """How far a run has come. Equal on every rank; every checkpoint stores it."""

    rounds: int = 0
    """Rounds trained. The weights after them have this number as their version."""
    optimizer_steps: int = 0
    rollout_tokens: int = 0
    """Response tokens of the rounds, each counted once, whatever the number of passes."""


def training_work(samples: Sequence[SampleRef], objective: ObjectiveConfig, block_size: int) -> list[int]:
    """About how many tokens of a forward each sample costs: its clean half, and the noisy copies of its response.

    With `all_states` a response has a noisy copy for each state, up to `block_size` of them; otherwise it has one.
    """
    copies = block_size if objective.resolved_selection == "all_states" else 1
    return [sample.prompt_tokens + (1 + copies) * sample.response_tokens for sample in samples]


def share_by_work(places: Sequence[int], work: Sequence[float], ranks: int) -> list[list[int]]:
    """Shares a batch among the ranks so that none waits long for another.

    The costliest sample comes first, and each goes to the rank that has the least work so far; among equals, to the one
    with the fewest samples. Micro-batches are cut by tokens, so ranks with equal work also have about equally many.

    Args:
        places: places in the round of the batch's samples.
        work: what each sample of the round costs, by place.

    Returns: the places of each rank, the costliest first.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for place in sorted(places, key=lambda place: -work[place]):
        rank = min(range(ranks), key=lambda r: (totals[r], len(shares[r])))
        shares[rank].append(place)
        totals[rank] += work[place]
    return shares


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then cosine to `min_lr_ratio x lr`.

    The first step already moves the weights: step w of W warm-up steps has rate `lr (w + 1) / W`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
