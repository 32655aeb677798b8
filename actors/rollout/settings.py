"""How the student decodes: everything a decoder is set to, except the model and the prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opdlm.common.config.base import Confidence
from opdlm.common.config.schema import Grid, Kind, RolloutConfig, Strategy
from opdlm.common.errors import OpdlmError


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """Settings of one decoder.

    The fields have the names and meanings of `rollout:` in the YAML (common/config/schema.py). `ignore_eos` exists only
    here: it decodes every response to its length limit, whatever end-of-sequence tokens it holds. So does
    `keep_logprobs`: trajectories have `reveal_logprob`. `keep_targets`: those of `verified` have `clean_hidden`.

    `finish_blocks` decodes what is behind an end-of-sequence token in its block, which the states that training
    rebuilds show (METHOD.md section 2). Without it a sequence ends as soon as its response is known: the same response,
    in fewer steps.
    """

    block_size: int = 4
    block_grid: Grid = "absolute"
    strategy: Strategy = "low_confidence_dynamic"
    threshold: float = 0.9
    entropy_budget: float = 0.1
    denoising_steps: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    confidence: Confidence = "sampled"
    keep_logprobs: bool = False
    keep_targets: bool = False
    ignore_eos: bool = False
    finish_blocks: bool = True

    def __post_init__(self) -> None:
        """Raises `OpdlmError` for a number that no distribution has; the command line and YAML are checked before."""
        for name, most in (("temperature", math.inf), ("entropy_budget", math.inf), ("threshold", 1), ("top_p", 1)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= most or value == math.inf:
                expected = "a finite number from 0" if most == math.inf else "a number within 0 and 1"
                raise OpdlmError(f"{name}: found {value!r}; expected {expected}")

    @property
    def keeps_notes(self) -> bool:
        """Whether something is noted of each token."""
        return self.keep_logprobs or self.keep_targets

    @property
    def steps_per_block(self) -> int:
        """Denoising steps over which the static count spreads the masks of one block (METHOD.md section 2)."""
        return self.denoising_steps or self.block_size

    @classmethod
    def from_config(cls, rollout: RolloutConfig, kind: Kind = "opd", keep_targets: bool = False) -> DecodeSettings:
        """The settings that the rollouts of a run with this `objective.kind` decode with."""
        shared = {name: getattr(rollout, name) for name in cls.__slots__ if hasattr(rollout, name)}
        shared["confidence"] = rollout.confidence or ("max_probability" if kind == "rl" else "sampled")
        return cls(**shared, keep_logprobs=kind == "rl", keep_targets=keep_targets)

    def greedy(self, strategy: Strategy) -> DecodeSettings:
        """These settings with greedy sampling and the given strategy, as evaluation decodes: responses only."""
        return replace(
            self,
            strategy=strategy,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            keep_logprobs=False,
            keep_targets=False,
            finish_blocks=False,
        )
