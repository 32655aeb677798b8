"""Sources and weights: which prompts an epoch uses, and how often.

An epoch uses each prompt of a source `weight` times. For the part of a weight behind the point, it takes the next
prompts of a fixed random order of the source, and begins again at its end. So a source of weight 0.5 gives one half of
its prompts to one epoch and the other half to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_ORDER = 1
"""Keeps the seeds of these orders apart from those of the epochs."""


@dataclass(frozen=True, slots=True)
class SourceShare:
    """The prompts of one source: `prompts[first : first + kept]` of the run's list."""

    name: str
    weight: float
    first: int
    kept: int
    refused: int = 0

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples that an epoch makes of its prompts."""
        return math.floor(self.weight * self.kept + 0.5)

    def figures(self) -> dict[str, Any]:
        """What the records of a run say of the source."""
        return asdict(self) | {"samples_per_epoch": self.samples_per_epoch}


def epoch_prompts(shares: Sequence[SourceShare], seed: int, epoch: int) -> np.ndarray:
    """The prompts of an epoch, each as often as the epoch uses it, in the order of the sources.

    Args:
        epoch: counted from 0.

    Returns:
        `[samples] int64`, places in the run's list of prompts.
    """
    parts = []
    for number, share in enumerate(shares):
        whole, rest = divmod(share.samples_per_epoch, share.kept)
        order = np.random.default_rng([seed, number, _ORDER]).permutation(share.kept)
        drawn = order[(epoch * rest + np.arange(rest)) % share.kept]
        parts += [share.first + np.tile(np.arange(share.kept), whole), share.first + drawn]
    return np.concatenate(parts).astype(np.int64)
