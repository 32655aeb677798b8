"""Ray tasks that move a round's samples between the object store and the round's file (`rollout_files.py`).

The samples pass through the task's process, on whichever node it runs: neither the driver nor a learner rank ever holds
a whole round of large samples. This module is light to import (no torch), because the tasks' processes load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from opdlm.common.batches import in_groups
from opdlm.common.samples import SampleRef, distinct_groups
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.rollout_files import RolloutFacts, load_samples, save_round


@dataclass(frozen=True, slots=True)
class ReadFacts:
    """What is known of samples that a task has read."""

    weight_versions: list[int]
    """Oldest weight version that decoded each sample."""
    lengths: list[tuple[int, int]]
    """(prompt tokens, response tokens) of each sample."""


def start_dump(file: Path, samples: list[SampleRef], facts: RolloutFacts) -> Any:
    """Starts writing a round's samples to its file.

    Returns: a reference that is ready once the file is there, or raises what went wrong.
    """
    return ray.remote(num_cpus=0)(_dump).remote(file, samples, facts)


def start_read(file: Path, indices: Sequence[int], per_reference: int) -> tuple[list[Any], Any]:
    """Starts reading samples, by their indices, from a round's file.

    Returns: (references to lists of `per_reference` samples each, the last maybe shorter; a reference to their
    `ReadFacts`).
    """
    outputs = -(-len(indices) // per_reference) + 1
    *groups, facts = ray.remote(num_cpus=0)(_read).options(num_returns=outputs).remote(file, indices, per_reference)
    return groups, facts


def _dump(file: Path, samples: list[SampleRef], facts: RolloutFacts) -> None:
    references = distinct_groups(samples)
    groups = dict(zip(references, ray.get(references), strict=True))
    save_round(file, [groups[sample.group][sample.place] for sample in samples], facts)


def _read(file: Path, indices: Sequence[int], per_reference: int) -> tuple[list[ScoredTrajectory] | ReadFacts, ...]:
    samples = load_samples(file, indices)
    lengths = [sample.trajectory.lengths for sample in samples]
    versions = [sample.trajectory.weight_version for sample in samples]
    return (*in_groups(samples, per_reference), ReadFacts(versions, lengths))
