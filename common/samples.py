"""Where samples are: references to lists of `ScoredTrajectory`, so that small samples share one reference.

Each reference costs its owner and its borrowers messages, whatever it stands for: 128 of them took longer to pass from
role to role than a small teacher takes to score (tests/benchmarks/RESULTS.md). A large sample keeps one of its own, so
that a learner rank fetches what it trains and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES

_GROUP_BYTES = 1 << 20
"""What samples behind one reference may have together."""
_PROMPT_BYTES = 4
"""Of a prompt token."""
_TRAJECTORY_BYTES = 10
"""Of a response token: id, step, version."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample: the `place`-th of the list behind a reference."""

    group: Any
    """The reference. Inside this record, so that Ray does not fetch it on the way."""
    place: int
    prompt_tokens: int
    response_tokens: int


def samples_per_reference(config: OpdlmConfig, model: Any, longest_prompt: int) -> int:
    """How many samples share a reference: so many have about a megabyte at the longest responses; 1 at least.

    Args:
        model: the teacher's transformers config.
        longest_prompt: in tokens.
    """
    teacher, width = config.teacher, model.hidden_size
    widths = {"hidden": width * DTYPE_BYTES[teacher.dtype], "topk": 8 * teacher.top_k, "logits": 4 * model.vocab_size}
    token = _TRAJECTORY_BYTES + (8 if config.objective.kind == "cft" else widths[teacher.targets])
    return max(_GROUP_BYTES // (token * config.rollout.max_new_tokens + _PROMPT_BYTES * longest_prompt), 1)


def sample_refs(groups: Sequence[Any], size: int, lengths: Sequence[tuple[int, int]]) -> list[SampleRef]:
    """One record a sample.

    Args:
        groups: references to lists of `size` samples (`in_groups`).
        lengths: (prompt tokens, response tokens) of each sample.
    """
    return [SampleRef(groups[i // size], i % size, *lengths[i]) for i in range(len(lengths))]


def distinct_groups(samples: Sequence[SampleRef]) -> list[Any]:
    """The references behind samples, each once."""
    return list(dict.fromkeys(sample.group for sample in samples))
