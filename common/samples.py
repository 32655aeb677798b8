"""Records of where samples are in Ray's object store. Small samples share one reference to a list of them.

Ray sends messages for each reference, however small its object is: passing 128 references from role to role took longer
than a small teacher takes to score (tests/benchmarks/RESULTS.md). A large sample has a reference of its own, so that a
learner rank fetches only the samples that it trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES

_GROUP_BYTES = 1 << 20
"""Largest size of a list of samples that share one reference, unless it holds a single sample."""
PROMPT_BYTES = 4
"""Bytes of a prompt token: its id."""
TRAJECTORY_BYTES = 12
"""Bytes of a response token in a trajectory: id (4), reveal step (4), weight version (4)."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample is: at index `place` of a list of `ScoredTrajectory`."""

    group: Any
    """Ray's reference to the list. Inside a record, Ray passes it on without fetching the list."""
    place: int
    """Index in the list, from 0."""
    prompt_tokens: int
    response_tokens: int


def samples_per_reference(config: OpdlmConfig, model: Any, longest_prompt: int) -> int:
    """How many samples share a reference: as many as have 1 MiB together when each has the longest length, at least 1.

    Args:
        model: the teacher's transformers config.
        longest_prompt: length of the longest prompt, in tokens.
    """
    token_bytes = response_token_bytes(config, model.hidden_size, model.vocab_size)
    sample_bytes = token_bytes * config.rollout.max_new_tokens + PROMPT_BYTES * longest_prompt
    return max(_GROUP_BYTES // sample_bytes, 1)


def response_token_bytes(config: OpdlmConfig, width: int, vocabulary: int) -> int:
    """Bytes of one response token in a sample: of the trajectory, and of the teacher's targets.

    Args:
        width: hidden size of the teacher.
        vocabulary: rows of its output matrix.
    """
    teacher = config.teacher
    target_bytes = {
        "hidden": width * DTYPE_BYTES[teacher.dtype],
        "topk": 8 * teacher.top_k,
        "logits": 4 * vocabulary,
    }
    objective = config.objective
    alone = 8 * (objective.kind in ("cft", "rl"))  # one token with its log-probability; two log-probabilities
    return TRAJECTORY_BYTES + alone + (target_bytes[teacher.targets] if objective.asks_teacher else 0)


def sample_refs(groups: Sequence[Any], size: int, lengths: Sequence[tuple[int, int]]) -> list[SampleRef]:
    """Makes the record of each sample.

    Args:
        groups: references to lists of `size` samples each, as `in_groups` cuts them.
        lengths: (prompt tokens, response tokens) of each sample, in order.
    """
    return [SampleRef(groups[i // size], i % size, *lengths[i]) for i in range(len(lengths))]


def distinct_groups(samples: Sequence[SampleRef]) -> list[Any]:
    """Returns the references to the lists that hold these samples, each once, in the order of first use."""
    return list(dict.fromkeys(sample.group for sample in samples))
