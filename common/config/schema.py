"""The schema of a run's configuration: one pydantic model per section of the YAML.

Unknown keys are refused, and the docstring below each field documents it. This package imports neither torch nor ray,
so that a mistake in a YAML file is reported in a fraction of a second. The sections of the roles are in `roles.py`,
those of the method in `method.py`, that of the data in `data.py`; checks that need two fields are in `checks.py`,
loading and overrides in `load.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdlm.common.config.base import (
    STRATEGIES_BY_ORDER,
    AnswerKind,
    Attention,
    DecodingOrder,
    Dtype,
    Grid,
    NonNegativeInt,
    Number,
    OnNewWeights,
    PathText,
    PositiveInt,
    Section,
    Seed,
    Strategy,
    Switch,
)
from opdlm.common.config.cluster import MachinesConfig, ResourcesConfig
from opdlm.common.config.data import DataConfig, DataSource
from opdlm.common.config.method import CurriculumConfig, Kind, ObjectiveConfig, OfflineConfig, Schedule, Selection
from opdlm.common.config.reward import RewardConfig, RewardKind
from opdlm.common.config.roles import (
    LearnerConfig,
    OptimizerConfig,
    PlacementConfig,
    QueueConfig,
    RolloutConfig,
    TeacherConfig,
    ZeroConfig,
)
from opdlm.common.form import PAPER_FORM, Context, StudentForm

__all__ = [
    "Attention",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "DataSource",
    "DecodingOrder",
    "Dtype",
    "EvaluationConfig",
    "Grid",
    "KeepBestConfig",
    "Kind",
    "LearnerConfig",
    "LoraConfig",
    "MachinesConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OfflineConfig",
    "OnNewWeights",
    "OpdlmConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "QueueConfig",
    "ResourcesConfig",
    "RewardConfig",
    "RewardKind",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "Selection",
    "Strategy",
    "TeacherConfig",
    "ZeroConfig",
]


class RunConfig(Section):
    """The run directory, the length of the run, and its reproducibility."""

    dir: PathText = "runs/run"
    """Run directory, for the resolved config, metrics, checkpoints, the trained student and the report. On a cluster, a
    path that every node can reach. One process at a time works in it (`lock.json`)."""
    seed: Seed = 0
    """Seed of the order of the data, of sampling, and of the selection of states. Two runs with one seed and the same
    numbers of actors and workers, on the same kind of machine, give the same results up to rounding, which depends on
    what is computed together (see `deterministic`). 0 to 2^64 - 1."""
    rounds: PositiveInt | None = None
    """Number of rounds to train, whatever `data.epochs` says. Empty: as many as `data.epochs` needs."""
    max_minutes: Annotated[Number, Field(gt=0)] | None = None
    """Minutes after which the run ends by itself: after the round in which they are over, with a checkpoint and exit
    code 0; `--resume` goes on for as long again. They count from the start of the command, and at least one round is
    trained. For machines that are lent by the hour. Empty: no limit."""
    deterministic: Switch = False
    """Use only deterministic torch kernels in the learner; some are slower, and an operation that has none ends the run
    with an error. The `transformers` teacher scores each trajectory in a forward of its own, and each rollout actor
    gets its share of a round at once. Turn it on, with `queue.max_staleness: 0`, to repeat a run to the bit."""
    dump_rollouts: Switch = False
    """Keep every scored trajectory that is trained on, one file per round, in `rollouts/` of the run directory, for
    `run.replay` of another run."""
    replay: PathText | None = None
    """Folder of rollouts that an earlier run kept with `dump_rollouts`. The run then trains on them and starts no
    rollout and no teacher actors. Empty: decode and score."""
    wandb_project: str | None = None
    """Weights & Biases project to which all metrics are sent as well (needs the extra `opdlm-ray[wandb]`). Empty:
    none."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA), which are trained instead of all weights (needs the extra `opdlm-ray[lora]`)."""

    rank: PositiveInt = 16
    """Rank of each adapter. A higher rank can learn more and has more parameters."""
    alpha: Annotated[Number, Field(gt=0)] = 32
    """Scaling: the output of an adapter is multiplied by `alpha / rank`."""
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Names of the linear layers that get an adapter. Embedding and output matrix are not trained."""
    tokens: Literal["all", "noisy"] = "all"
    """Which tokens the adapters act on. `all`: every token; rollout actors and the exported student get them merged
    into the weights. `noisy` (METHOD.md section 11): masks and the tokens of their block alone, together with an
    embedding of the mask token. Clean tokens then are computed by the frozen base model, so `rollout.strategy:
    verified` decodes what the teacher would write, and a push moves the adapters only. It needs `logit_shift: true` and
    `context: causal`."""


class ModelConfig(Section):
    """The frozen teacher, and the student that is trained."""

    teacher: PathText
    """Folder of the autoregressive teacher in Hugging Face layout, or a hub id such as `Qwen/Qwen3-0.6B`, which the
    driver downloads. It has no default. `objective.kind: rl` alone starts no teacher, but takes tokens and sizes from
    here."""
    student: PathText | None = None
    """Folder (or hub id) of a converted model whose weights the student starts from. Empty: the teacher is converted,
    and a mask token added where it has none."""
    mask_token: str | None = None
    """Text of the mask token where the teacher is converted, as in `opdlm convert --mask-token`. Needed where the
    tokenizer's own mask token has another role (it ends responses, say). Empty: the tokenizer's, else `<|MASK|>`."""
    logit_shift: Switch | None = None
    """Whether the student predicts a token at the position before it, as the teacher does, instead of at the token's
    own (METHOD.md section 11). Empty: what config.json of `student` says; false where the teacher is converted, as in
    the paper."""
    context: Context | None = None
    """What the student's clean tokens attend to. `block_causal`: earlier blocks and their whole block (the paper).
    `causal`: earlier tokens only, as the teacher's do; it needs `rollout.block_grid: response`. Empty: what config.json
    of `student` says; `block_causal` where the teacher is converted."""
    dtype: Dtype = "bfloat16"
    """Number format of the student's weights in decoding and training. With bfloat16 the optimizer also keeps float32
    weights."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; `{}` turns them on with their defaults. Rollout actors and the
    exported student get the adapters merged into the weights, and `RUN/adapter` holds them alone. Empty: train all
    weights. With adapters the mask token's embedding is not trained, as no embedding is. With `dtype: bfloat16` merging
    rounds, so a weight that decodes differs from the one that trains by up to half a bfloat16 step."""
    attention: Attention = "auto"
    """Attention of the learner's forward. `flex_attention`: block masks, GPU only. `sdpa`: two dense calls, one for
    clean and one for noisy tokens. `auto`: `flex_attention` on a GPU, `sdpa` on the CPU and for heads narrower than 16
    numbers."""

    @property
    def converted_form(self) -> StudentForm:
        """The form that the teacher gets where the run converts it."""
        return PAPER_FORM.replaced(self.logit_shift, self.context)


class KeepBestConfig(Section):
    """Which weights are the best, by a figure of the evaluations during training, and when no better ones are expected.

    Only these evaluations count (`evaluation.every_rounds`): the ones before and after training have other problems.
    """

    figure: str = "exact_match"
    """The figure: `exact_match` or `tokens_per_step`, of everything that is asked; that of one task, as
    `add/exact_match` (`exact_match`, `token_match` and `tokens_per_step`); with `evaluation.data` also `data_right`,
    `of_teacher`, `agreement`, `token_agreement`, `held_out_kl`, and that of one kind of questions, as
    `capitals/right`."""
    mode: Literal["max", "min"] = "max"
    """Whether a high figure is good (`max`) or a low one (`min`). Of equal ones the first counts."""
    patience: PositiveInt | None = None
    """Early stop: training ends after this number of evaluations in a row without a better figure. The run is finished
    then: the student is exported, and the last evaluations are made. Empty: all rounds are trained."""
    min_delta: Annotated[Number, Field(ge=0)] = 0.0
    """For `patience`, a figure counts as better if it is better by more than this. The best weights are kept whatever
    it says."""


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every_rounds: PositiveInt = 10
    """Number of rounds between two checkpoints. One is also written at the end of the run and on SIGTERM or SIGINT. A
    failure loses the training since the last one at most."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept. While a new one is written, the disk holds one more."""
    max_failed_saves: NonNegativeInt = 2
    """Number of checkpoints in a row that may fail to be written, as on a full disk; one more ends the run. 0: the
    first failure ends it. Earlier checkpoints stay whole. Until a save succeeds, the queue keeps all samples since the
    last checkpoint in Ray's object store, for a learner that has to train them again. The last checkpoint of a run must
    succeed."""
    keep_best: KeepBestConfig | None = None
    """Keep the student of the best evaluation during training as a model folder, `RUN/best/round-NNNNNN`; `{}` turns it
    on with its defaults. It stays when old checkpoints are removed. Empty: only the last student is kept."""


class EvaluationConfig(Section):
    """Evaluation before, during and after training: on held-out problems of built-in tasks, and on own questions."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks to evaluate on, each by itself. Empty: `data.task`; without one, no task."""
    data: PathText | None = None
    """Questions to evaluate on, beside the tasks: a file as `data.path` names it, or `knowledge`, which comes with the
    package. A row has a prompt and an accepted answer, or a list of them, and perhaps `mark` (how it is marked) and
    `kind` (whose scores are shown by themselves). With it an evaluation also says how close the student's answers are
    to the teacher's, and KL(teacher || student) on them. Empty: tasks only."""
    prompt_field: str = "prompt"
    """Column of `evaluation.data` with the prompt: text, or a list of chat messages."""
    answer_field: str | None = None
    """Column of `evaluation.data` with the accepted answers. Empty: `answers`, else `answer`."""
    mark: AnswerKind | None = None
    """How rows of `evaluation.data` are marked that have no column `mark`. `exact`: the text is the answer's;
    `contains`: the answer's words are in it, whatever case and punctuation; `math`: its last number or \\boxed{} has
    the answer's value (needs the extra `opdlm-ray[eval]`). Empty: `exact`."""
    chat_template: Switch | None = None
    """Put prompts of `evaluation.data` through the chat template. Empty: as `data.chat_template` says."""
    limit: PositiveInt | None = None
    """Number of questions of `evaluation.data` in an evaluation during training, as many of each kind; always the same
    ones. Empty: all. The evaluations before and after training ask all."""
    every_rounds: PositiveInt | None = None
    """Number of rounds between two evaluations during training, which decode with `rollout.threshold` in the
    order of `order`. Empty: none during training."""
    order: DecodingOrder | None = None
    """Which position a step of an evaluation reveals first. `confidence`: the most confident; evaluations decode with
    `low_confidence_static` and `low_confidence_dynamic`. `sequential`: the leftmost; with `sequential` and
    `sequential_dynamic`. Empty: that of `rollout.strategy`, `confidence` where it has neither. config.json of the
    run's students names it (`decoding_order`), and what decodes them later follows it unless told otherwise."""
    actors: NonNegativeInt = 0
    """Number of extra rollout actors that do the evaluations during training, so that training goes on meanwhile; each
    reserves as much as a rollout actor. 0: the rollout actors evaluate, and decoding waits."""
    problems: PositiveInt = 200
    """Number of problems of each task in an evaluation during training."""
    final_problems: NonNegativeInt = 1000
    """Number of problems of each task in the evaluations before and after training. 0 turns both off."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens. An answer that has not ended by then is wrong."""
    batch_size: PositiveInt = 128
    """Number of problems that one actor decodes at the same time."""


class OpdlmConfig(Section):
    """The configuration of a whole run; only `model.teacher` and the prompts (`data`) have no default."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    queue: QueueConfig = QueueConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    offline: OfflineConfig = OfflineConfig()
    reward: RewardConfig = RewardConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def starts_teachers(self) -> bool:
        """Whether teacher actors are started: they score, or write the responses that `cft` is given."""
        scores = self.objective.asks_teacher and not self.rollouts_bring_targets
        return scores or self.objective.kind in ("cft", "off_policy_kd")

    @property
    def rollouts_bring_targets(self) -> bool:
        """Whether rollouts come with the teacher's distributions, because the clean path that verifies drafts is it."""
        return self.rollout.strategy == "verified"

    @property
    def decoding_order(self) -> DecodingOrder:
        """The order in which the run's students are examined, and which their config.json names."""
        in_order = self.rollout.strategy in STRATEGIES_BY_ORDER["sequential"]
        return self.evaluation.order or ("sequential" if in_order else "confidence")

    @property
    def reference_actors(self) -> int:
        """Actors that hold the frozen reference of a policy gradient; 0 for a run that has none."""
        has_reference = self.objective.kind == "rl" and self.objective.kl_beta > 0
        return self.reward.reference_actors if has_reference else 0
