"""The settings of the method: objective, given responses, schedules, curriculum (METHOD.md sections 4 to 7)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdlm.common.config.base import (
    NonNegativeInt,
    Number,
    PathText,
    PositiveInt,
    Probability,
    Section,
    Switch,
)

Kind = Literal["opd", "off_policy_kd", "cft", "rl"]
Advantage = Literal["group_std", "group_mean"]
Selection = Literal[
    "one_state_per_block",
    "one_state_per_response",
    "all_states",
    "random_mask",
    "revealed",
    "one_sampled_state",
    "drafts",
]


class ObjectiveConfig(Section):
    """What is trained on, and how the distance between student and teacher is measured (METHOD.md sections 4, 5)."""

    kind: Kind = "opd"
    """What the run trains on and towards what. `opd`: on-policy distillation, on the student's own rollouts towards the
    teacher's distributions. `off_policy_kd`: on given responses towards the teacher's distributions. `cft`: conversion
    fine-tuning (the SDAR and BD3-LM baseline), by cross-entropy on the tokens of given responses. The section `offline`
    says where given responses come from. `rl`: policy gradient, on groups of the student's own rollouts towards a
    higher `reward`; no teacher is needed."""
    selection: Selection | None = None
    """Which states of a trajectory become training rows. `one_state_per_block`: one visited state per block, drawn
    uniformly (the paper's recipe). `one_state_per_response`: one index, drawn for the whole response, picks the state
    of every block. `all_states`: every visited state; row k holds the k-th state of every block. `random_mask`: the
    trajectory is ignored and each block is masked at random (with `opd`, the paper's OPDLM-off). With
    `rl`, `revealed` takes each token's loss in the state that revealed it, one row for each of a block's states, and
    `one_sampled_state` draws one of these states for each block, which costs one row and has the same expectation.
    `drafts` goes with `rollout.strategy: verified`: one row, with all masks of every draft that decoding asked for.
    Empty: `one_state_per_block` for `opd`, `revealed` for `rl`, and `random_mask` for the other kinds, whose responses
    have no visited states."""
    unreached_weight: Probability = 1.0
    """With `selection: drafts`, the weight of the places of a draft behind its first wrong token. Decoding never came
    to them, since a wrong draft ends what is accepted. 1: all places of a draft count the same; 0: these are left
    out. A mean over loss positions is then `sum(weight x loss) / sum(weight)`."""
    divergence: Literal["kl", "jsd"] = "kl"
    """The distance that is minimised. `kl`: forward KL(teacher || student), mixed with reverse KL by `reverse_weight`.
    `jsd`: the Jensen-Shannon divergence with `jsd_alpha`. `cft` uses neither."""
    reverse_weight: Probability = 0.0
    """With `divergence: kl`, the weight w in (1-w) forward KL + w reverse KL. 0 (the default, the paper's) is forward
    KL alone, 1 is reverse KL alone."""
    jsd_alpha: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """With `divergence: jsd`, the weight of the teacher in the mixture distribution, between 0 and 1 exclusive."""
    top_k: NonNegativeInt = 0
    """Number of tokens that the divergence sums over. 0 is the full vocabulary (paper: at 0.6B and 1.7B); K is the
    teacher's K likeliest tokens (paper: 16 at 4B and 8B). K must not exceed `teacher.top_k` with
    `teacher.targets: topk`."""
    tail: Literal["drop", "bucket"] = "drop"
    """With `top_k` above 0, what becomes of the probability outside the top K. `drop`: it is left out, as in the public
    release. `bucket`: it counts as one more outcome, so that the loss is a true divergence, never negative."""
    weights: ResponseWeights | None = None
    """With `cft` and `off_policy_kd`, weights of the reasoning and of the answer in each response. A mean over loss
    positions is then `sum(weight x loss) / sum(weight)`. Empty: every token counts the same."""
    teacher_temperature: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    """The student learns the teacher's distribution at this temperature, by which its logits are divided. 1 is the
    teacher's own distribution (the method). A lower value keeps the teacher's likeliest tokens and makes the student
    surer of them, so that more tokens pass the confidence threshold in a step; what the student samples then varies
    less. `cft` has no teacher's distribution, and `teacher.targets: topk` does not give all logits."""
    exclude_eos: Switch = True
    """Take no loss at the end-of-sequence token (the release's default). Set it to false to train where responses end
    as well, as `deploy/demo.yaml` does. `rl` always trains it."""
    advantage: Advantage = "group_std"
    """With `rl`, how the rewards R of a prompt's responses become advantages. `group_std`: (R - mean) / (standard
    deviation + 1e-6). `group_mean`: R - mean."""
    clip_low: Annotated[Number, Field(ge=0, le=1)] = 0.2
    """With `rl`, a token whose probability has fallen below 1 - `clip_low` times that of the rollout gets no gradient
    that lowers it further."""
    clip_high: Annotated[Number, Field(ge=0)] = 0.2
    """With `rl`, a token whose probability has risen above 1 + `clip_high` times that of the rollout gets no gradient
    that raises it further."""
    kl_beta: Annotated[Number, Field(ge=0)] = 0.0
    """With `rl`, the weight of the distance from a frozen reference, the student as the run began. 0: no reference."""
    opd_weight: Annotated[Number, Field(ge=0)] = 0.0
    """With `rl`, the weight of the distillation's loss at the same tokens in the same states, which is added to the
    policy gradient's: rewards and teacher together. 0: no teacher is started."""
    reduction: Literal["row", "token"] = "row"
    """How the loss of a batch is averaged. `row`: over the loss positions of each row, then over the rows (the
    release's), so every response has the same weight. `token`: over all loss positions of the batch, so every token has
    the same weight; `rl` always does this."""

    @property
    def resolved_selection(self) -> Selection:
        """The `selection`, or the default of the `kind` where it is empty."""
        default: dict[Kind, Selection] = {"opd": "one_state_per_block", "rl": "revealed"}
        return self.selection or default.get(self.kind, "random_mask")

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher scores the trajectories."""
        return self.kind in ("opd", "off_policy_kd") or (self.kind == "rl" and self.opd_weight > 0)

    @property
    def loss_is_forward_kl(self) -> bool:
        """Whether the loss is KL(teacher || student) in nats.

        No rewards, no mixture, no JSD, no sum over the top K alone, no other temperature.
        """
        has_all_mass = self.top_k == 0 or self.tail == "bucket"
        is_own = self.kind not in ("cft", "rl") and self.teacher_temperature == 1
        return is_own and self.divergence == "kl" and self.reverse_weight == 0 and has_all_mass


class ResponseWeights(Section):
    """How much the two parts of a given response count: its reasoning and its answer (METHOD.md section 10)."""

    mark: Annotated[str, Field(min_length=1)]
    """Text of the token that ends the reasoning, such as `#` or `</think>`: one token of the tokenizer, the last one in
    a response. It counts as reasoning; a response without it is all answer."""
    reasoning: Annotated[Number, Field(ge=0)] = 1.0
    """Weight of a token of the reasoning."""
    answer: Annotated[Number, Field(gt=0)] = 1.0
    """Weight of a token of the answer."""


class OfflineConfig(Section):
    """Where the given responses of the objectives `off_policy_kd` and `cft` come from. `opd` ignores this section."""

    responses: Literal["teacher", "data"] = "teacher"
    """`teacher`: the teacher actors generate the responses once, before training, and keep them in a parquet file.
    `data`: the responses are those of `data.response_field`, or the solutions of `data.task`."""
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    """Sampling temperature of the teacher's responses; 0 is greedy decoding. Used with `responses: teacher`."""
    batch_size: PositiveInt = 64
    """Number of responses that one teacher actor generates at the same time. Lower it where the actor runs out of
    memory."""
    cache: PathText | None = None
    """Parquet file of the teacher's responses. The run generates the responses that the file does not hold yet, to the
    prompts of its own rounds (`run.rounds`) only. Empty: `offline_responses.parquet` in the run directory. Give a path
    to share the file between runs. A file that was made from another teacher, in another `teacher.dtype`, from other
    prompts, or with another length limit, temperature or seed is refused."""


class Schedule(Section):
    """A number that changes from `start` to `end` during the first `rounds` rounds and stays at `end` afterwards."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change. `constant`: the value is always `start`. `linear`: a straight line (the paper's). `cosine`:
    `start + (end - start)(1 - cos(pi/2 r/rounds))` in round r, slow at first (the release's)."""
    start: Number
    """Value in round 0."""
    end: Number | None = None
    """Value from round `rounds` on. Required for `linear` and `cosine`; leave it empty for `constant`."""
    rounds: PositiveInt | None = None
    """Number of rounds until `end` is reached. Required for `linear` and `cosine`; leave it empty for `constant`."""


class CurriculumConfig(Section):
    """Limits that change from round to round while the student learns (METHOD.md section 6)."""

    max_new_tokens: Schedule | None = None
    """Schedule of the longest response in tokens. Empty: `rollout.max_new_tokens` in every round. Short responses in
    the first rounds save the decoding of text that an untrained student cannot write yet; the paper grows the length
    from 100 to 4,000 tokens in 10 rounds."""
    threshold: Schedule | None = None
    """Schedule of the confidence threshold of the dynamic strategies, between 0 and 1. Empty: `rollout.threshold` in
    every round."""
    max_new_tokens_per_domain: dict[str, PositiveInt] = Field(default_factory=dict)
    """Longest response in tokens for each domain of prompts (`data.domain_field`), for example `{code: 2048}`. A domain
    that is not listed has no limit of its own. Paper: math 4096, code and chat 2048, science 1024."""
