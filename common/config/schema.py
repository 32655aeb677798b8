"""The configuration of a run, as data.

One pydantic model per room; unknown keys are refused, every field says what it is and in which unit. This package
imports neither torch nor ray, so that a mistake in a YAML costs a fraction of a second. Checks that need two fields
live in `checks.py`, loading and overrides in `load.py`. Sections of the roles are in `roles.py`, of the method in
`method.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opdlm.common.config.base import (
    Attention,
    Dtype,
    Grid,
    NonNegativeInt,
    OnNewWeights,
    PositiveInt,
    Section,
    Strategy,
)
from opdlm.common.config.method import CurriculumConfig, Kind, ObjectiveConfig, OfflineConfig, Schedule, Selection
from opdlm.common.config.roles import (
    LearnerConfig,
    OptimizerConfig,
    PlacementConfig,
    QueueConfig,
    ResourcesConfig,
    RolloutConfig,
    TeacherConfig,
    ZeroConfig,
)

__all__ = [
    "Attention",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "Dtype",
    "EvaluationConfig",
    "Grid",
    "Kind",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OfflineConfig",
    "OnNewWeights",
    "OpdlmConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "QueueConfig",
    "ResourcesConfig",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "Selection",
    "Strategy",
    "TeacherConfig",
    "ZeroConfig",
]


class RunConfig(Section):
    """Identity, length and reproducibility of the run."""

    dir: str = "runs/run"
    """Run directory: resolved config, metrics, checkpoints, report. On a cluster, a path that every node sees."""
    seed: NonNegativeInt = 0
    """Seed of data order, decoding, state selection. Two runs with one seed on one machine shape agree."""
    rounds: PositiveInt | None = None
    """Rounds to train. Empty: as many as `data.epochs` gives."""
    deterministic: bool = False
    """Ask torch for deterministic kernels in the learner (some are slower; an operation without one is an error)."""
    dump_rollouts: bool = False
    """Keep every scored trajectory that is trained on, a file a round, in `rollouts/` of the run directory."""
    replay: str | None = None
    """Folder of rollouts that a run kept: train on them instead of decoding and scoring. Empty: decode and score."""
    wandb_project: str | None = None
    """Weights & Biases project that gets all metrics too (extra `wandb`). Empty: none."""


class LoraConfig(Section):
    """Low-rank adapters instead of all weights (peft; extra `lora`)."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scaling: an adapter counts `alpha / rank`."""
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers that get one. Embedding and output matrix stay as they are."""


class ModelConfig(Section):
    """The frozen teacher and the student that starts from it."""

    teacher: str
    """Folder of the autoregressive teacher in Hugging Face layout."""
    student: str | None = None
    """Folder of the student's start. Empty: the teacher is converted (mask token added where missing)."""
    dtype: Dtype = "bfloat16"
    """Number format of the student in decoding and training; DeepSpeed keeps float32 masters beside bfloat16."""
    lora: LoraConfig | None = None
    """Train adapters only; rollout actors and exports get merged weights, `RUN/adapter` the adapter. Empty: train
    everything. The mask token's embedding then stays at its start, as all embeddings do. With `dtype: bfloat16` merging
    rounds: what decodes differs from what trains by up to half a bfloat16 step of each weight."""
    attention: Attention = "auto"
    """Attention of the training forward. `auto`: flex_attention on GPU, sdpa in two parts on CPU."""


class DataConfig(Section):
    """Where prompts come from, and in which order and number they are used."""

    task: str | None = None
    """Built-in task that makes prompts and checks answers: `chain`, `add`, ...; several mixed: `add+sort`."""
    path: str | None = None
    """Prompts instead of a task: a .jsonl or .parquet file, a folder that `datasets` saved, or a hub id."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set."""
    prompt_field: str = "prompt"
    """Column of the prompt: text, a list of token ids, or a list of chat messages (`role`, `content`)."""
    response_field: str | None = None
    """Column of the response (text or token ids), for `offline.responses: data`."""
    domain_field: str = "domain"
    """Column of the domain (optional in the data); `curriculum.max_new_tokens_per_domain` caps by it."""
    max_new_tokens_field: str = "max_new_tokens"
    """Column of a row's own response limit in tokens (optional in the data)."""
    chat_template: bool = False
    """Put each prompt through the tokenizer's chat template; text counts as one user message."""
    system_prompt: str | None = None
    """System message in front of every conversation (with `chat_template`)."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template (Qwen3). Empty: the template's default."""
    prompts: PositiveInt | None = None
    """Prompts in an epoch: how many a task makes, or an upper limit for a file."""
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are refused by name and counted, never cut. Empty: whatever fits the model's context."""
    epochs: PositiveInt = 1
    """Passes over the prompts, each in its own order."""


class CheckpointConfig(Section):
    """Saving and keeping."""

    every_rounds: PositiveInt = 10
    """Rounds between checkpoints; one is also written at the end and on SIGTERM or SIGINT."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay on disk. While one is written there are `keep` + 1."""
    max_failed_saves: NonNegativeInt = 2
    """Checkpoints in a row that may fail to be written (a full disk); one more ends the run, and 0 ends it at the
    first. The ones before stay whole. Meanwhile the queue keeps all samples since the last checkpoint in Ray's object
    store, for a learner that dies. The last checkpoint of a run may never fail."""


class EvaluationConfig(Section):
    """Exact match on held-out problems of tasks."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks to examine, each by itself. Empty: `data.task`."""
    every_rounds: PositiveInt | None = None
    """Rounds between evaluations while training (dynamic decoding). Empty: none."""
    actors: NonNegativeInt = 0
    """Spare actors for these, as large as a rollout actor, so that training goes on meanwhile. 0: rollout actors."""
    problems: PositiveInt = 200
    """Problems of each task in a periodic evaluation."""
    final_problems: NonNegativeInt = 1000
    """Problems of each task in the evaluation before and after training; 0 turns both off."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    batch_size: PositiveInt = 128
    """Problems decoded side by side."""


class OpdlmConfig(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    queue: QueueConfig = QueueConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    offline: OfflineConfig = OfflineConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
