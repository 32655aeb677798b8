"""The settings of rewards (METHOD.md sections 7 and 10)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from opdlm.common.config.base import Number, PositiveInt, Section

RewardKind = Literal["exact", "math", "rerank", "python"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _function(value: str) -> str:
    if not _FUNCTION.fullmatch(value):
        raise ValueError(f"found {value!r}; expected module:function, such as my_rewards:brevity")
    return value


class RewardConfig(Section):
    """What a finished response of `objective.kind: rl` is worth, and the actors that say so."""

    kind: RewardKind = "exact"
    """`exact`: 1 for a response that equals the solution of `data.task` or the text of `data.response_field`, else 0.
    `math`: 1 for the same mathematical value (needs the extra `opdlm-ray[eval]`), else 0. `rerank`: by how much the
    target of a re-ranking case rose, and -1 for an answer that is no order of the candidates (METHOD.md section 10).
    `python`: what `function` says."""
    function: Annotated[str, AfterValidator(_function)] | None = None
    """With `kind: python`, `module:function`. Reward actors import the module and call the function with an `Attempt`
    (`common/rewards/attempt.py`) for each response; it returns a finite number. This runs code: use modules that you
    trust. The module must be importable on every node."""
    time_limit_seconds: Annotated[Number, Field(gt=0)] = 10.0
    """With `kind: python`, the longest time of one call. A call that takes longer ends the run with an error that names
    the sample."""
    validity_alone: bool = False
    """With `kind: rerank`, every valid answer gets the 0.2 of METHOD.md section 10, whether the target rose or not. It
    teaches the model to copy the input order, and is there to show that. `false`: only where the target rose, or was
    first and stays first, as in the paper."""
    actors: PositiveInt = 1
    """Number of reward actors."""
    reference_actors: PositiveInt = 1
    """With `objective.kl_beta`, number of actors that hold the frozen reference. Each reserves as much as a rollout
    actor."""
    cpus_per_actor: Annotated[Number, Field(gt=0)] = 1
    """CPUs that Ray reserves for each reward actor."""
