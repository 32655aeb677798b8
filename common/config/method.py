"""What is trained on and how: objective, given responses, schedules, curriculum (METHOD.md sections 4 to 7)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdlm.common.config.base import NonNegativeInt, PositiveInt, Probability, Section

Kind = Literal["opd", "off_policy_kd", "cft"]
Selection = Literal["one_state_per_block", "one_state_per_response", "all_states", "random_mask"]


class ObjectiveConfig(Section):
    """Which states are trained on and how far the student is from the teacher there (METHOD.md sections 4, 5)."""

    kind: Kind = "opd"
    """`opd`: the student's own rollouts, towards the teacher's distributions; `off_policy_kd`: the same on given
    responses; `cft`: cross-entropy on the tokens of given responses (conversion fine-tuning, the SDAR/BD3-LM
    baseline). Given responses come from `offline`."""
    selection: Selection | None = None
    """Which of a trajectory's states become training rows. Empty: `one_state_per_block` for `opd`, `random_mask` for
    the others, whose responses have no visited states. `opd` with `random_mask` is the paper's OPDLM-off."""
    divergence: Literal["kl", "jsd"] = "kl"
    """`kl`: forward KL, mixed with reverse KL by `reverse_weight`; `jsd`: Jensen-Shannon with `jsd_alpha`."""
    reverse_weight: Probability = 0.0
    """w of (1-w) forward + w reverse KL: 0 forward only, 1 reverse only."""
    jsd_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the JSD's mixture."""
    top_k: NonNegativeInt = 0
    """0: over the full vocabulary; K: over the teacher's K likeliest tokens."""
    tail: Literal["drop", "bucket"] = "drop"
    """With top-K: forget the remaining mass (the release), or carry it as one more outcome (a true divergence)."""
    exclude_eos: bool = True
    """Take no loss at the end-of-sequence token (the release's default)."""
    reduction: Literal["row", "token"] = "row"
    """`row`: mean over a row's loss positions, then over rows; `token`: mean over all positions of the batch."""

    @property
    def states(self) -> Selection:
        """The selection, resolved."""
        return self.selection or ("one_state_per_block" if self.kind == "opd" else "random_mask")

    @property
    def loss_is_forward_kl(self) -> bool:
        """Whether the loss is KL(teacher || student) in nats, and not a mixture, a JSD or a sum cut at the top K."""
        whole = self.top_k == 0 or self.tail == "bucket"
        return self.kind != "cft" and self.divergence == "kl" and self.reverse_weight == 0 and whole


class OfflineConfig(Section):
    """The given responses of `off_policy_kd` and `cft`."""

    responses: Literal["teacher", "data"] = "teacher"
    """`teacher`: generated once by the teacher actors and kept as parquet; `data`: from `data.response_field`, or the
    solutions of `data.task`."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature of the teacher's responses; 0 is greedy."""
    batch_size: PositiveInt = 64
    """Responses that one teacher actor generates side by side."""
    cache: str | None = None
    """Parquet file of the teacher's responses, made where it is missing. Empty: `offline_responses.parquet` in the run
    directory; a path of its own is shared between runs. One made otherwise (teacher, prompts, limits) is refused."""


class Schedule(Section):
    """A number that moves from `start` to `end` over the first `rounds` rounds, then stays."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """`linear`: the paper's; `cosine`: `start + (end - start)(1 - cos(pi/2 s/rounds))`, the release's."""
    start: float
    """Value in round 0."""
    end: float | None = None
    """Value from round `rounds` on. Empty for `constant`."""
    rounds: PositiveInt | None = None
    """Rounds until `end` is reached. Empty for `constant`."""


class CurriculumConfig(Section):
    """What grows while the student learns (METHOD.md section 6)."""

    max_new_tokens: Schedule | None = None
    """Rollout length in tokens by round. Empty: `rollout.max_new_tokens` throughout."""
    threshold: Schedule | None = None
    """Dynamic threshold by round. Empty: `rollout.threshold` throughout."""
    max_new_tokens_per_domain: dict[str, PositiveInt] = Field(default_factory=dict)
    """Length caps by a prompt's domain, in tokens (paper: math 4096, code and chat 2048, science 1024)."""
