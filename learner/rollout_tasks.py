"""Ray tasks that move a round's samples between the object store and its file, on whichever node.

Neither the driver nor a learner rank ever holds a whole round. This module is light: the tasks' processes load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from common.types import ScoredTrajectory
from learner.rollout_files import RolloutFacts, load_samples, save_round


def start_dump(file: Path, references: list[Any], facts: RolloutFacts) -> Any:
    """Starts writing; the reference that comes back is ready when the file is there, or raises what went wrong."""
    return ray.remote(num_cpus=0)(_dump).remote(file, references, facts)


def start_read(file: Path, indices: Sequence[int]) -> tuple[list[Any], Any]:
    """Starts reading; (references to those samples, a reference to the oldest weight version among them)."""
    *samples, version = ray.remote(num_cpus=0)(_read).options(num_returns=len(indices) + 1).remote(file, indices)
    return samples, version


def _dump(file: Path, references: list[Any], facts: RolloutFacts) -> None:
    save_round(file, ray.get(references), facts)


def _read(file: Path, indices: Sequence[int]) -> tuple[ScoredTrajectory | int, ...]:
    samples = load_samples(file, indices)
    return (*samples, min(sample.trajectory.weight_version for sample in samples))
