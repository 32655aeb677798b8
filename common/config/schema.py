"""The configuration of a run, as data.

One pydantic model per room; unknown keys are refused, every field says what it is and in which unit. This package
imports neither torch nor ray, so that a mistake in a YAML costs a fraction of a second. Checks that need two fields
live in `checks.py`, loading and overrides in `load.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Strategy = Literal["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "sequential", "random"]
Grid = Literal["absolute", "response"]
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "flex_attention"]

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: strict about keys, documented by docstrings, immutable once loaded."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=())


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


class ModelConfig(Section):
    """The frozen teacher and the student that starts from it."""

    teacher: str
    """Folder of the autoregressive teacher in Hugging Face layout."""
    student: str | None = None
    """Folder of the student's start. Empty: the teacher is converted (mask token added where missing)."""
    dtype: Dtype = "bfloat16"
    """Number format of the student in decoding and training; DeepSpeed keeps float32 masters beside bfloat16."""
    attention: Attention = "auto"
    """Attention of the training forward. `auto`: flex_attention on GPU, dense boolean sdpa on CPU."""


class DataConfig(Section):
    """Where prompts come from, and in which order and number they are used."""

    task: str | None = None
    """Built-in task that makes prompts and checks answers: `chain`."""
    path: str | None = None
    """JSONL file of prompts, instead of a task: one object a line."""
    prompt_field: str = "prompt"
    """Key of the prompt text in a JSONL line (or of a list of token ids)."""
    domain_field: str = "domain"
    """Key of the domain in a JSONL line (optional there); `curriculum.max_new_tokens_per_domain` caps by it."""
    prompts: PositiveInt | None = None
    """Prompts in an epoch: how many a task makes, or an upper limit for a file."""
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are refused by name and counted, never cut. Empty: whatever fits the model's context."""
    epochs: PositiveInt = 1
    """Passes over the prompts, each in its own order."""


class RolloutConfig(Section):
    """The student's decoding (METHOD.md section 2) and the pool of actors that does it."""

    actors: PositiveInt = 1
    """Rollout actors."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor; 1 dedicates a GPU."""
    prompts_per_round: PositiveInt = 128
    """Prompts decoded with one weight version (the paper: 128)."""
    batch_size: PositiveInt = 64
    """Sequences decoded side by side in one actor (slots); a slot is refilled as its sequence ends."""
    block_size: PositiveInt = 4
    """Tokens in a block (paper: 4)."""
    block_grid: Grid = "absolute"
    """`absolute`: blocks counted from the prompt's first token; `response`: the response starts a fresh block."""
    denoising_steps: PositiveInt | None = None
    """Denoising steps a block is planned for. Empty: `block_size`, so one token a step when static."""
    strategy: Strategy = "low_confidence_dynamic"
    """Remasking strategy: which positions a step reveals."""
    threshold: Probability = 0.9
    """`low_confidence_dynamic`: positions of higher confidence are revealed (unless the curriculum schedules it)."""
    entropy_budget: Annotated[float, Field(ge=0)] = 0.1
    """`entropy_bounded`: nats of entropy that a step may reveal."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature of candidates; 0 is greedy. Confidence is always taken without it."""
    top_k: NonNegativeInt = 0
    """Candidates come from the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Candidates come from the smallest set of tokens with this mass; 1 is all."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens, whatever the curriculum says; never exceeded."""


class TeacherConfig(Section):
    """Scoring by the frozen teacher (METHOD.md section 3)."""

    actors: PositiveInt = 1
    """Teacher actors."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor."""
    dtype: Dtype = "bfloat16"
    """Number format of the teacher's forward."""
    targets: Literal["hidden", "topk", "logits"] = "hidden"
    """What travels to the learner: final hidden states (exact full vocabulary), top-K, or all logits."""
    top_k: PositiveInt = 16
    """K of `targets: topk` (paper: 16 at 4B and 8B)."""
    batch_tokens: PositiveInt = 16384
    """Most tokens in one forward, padding included; a longer single trajectory goes alone."""


class QueueConfig(Section):
    """The replay queue between decoding and training."""

    max_staleness: NonNegativeInt = 0
    """Rounds that decoding may run ahead of training. 0: decode, score, train, push, strictly on-policy."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate (paper: 1e-5 to 1e-6)."""
    min_lr_ratio: Probability = 0.1
    """Learning rate at the end, as a share of the peak (paper: 0.1)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: NonNegativeInt = 5
    """Optimizer steps of linear warm-up (paper: 5)."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """AdamW's betas."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (paper: none)."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = 2
    """What is sharded over the workers: 1 optimizer, 2 and gradients, 3 and weights."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory (GPU learners; ignored by a learner that is on the CPU)."""
    offload_weights: bool = False
    """Keep ZeRO-3 weights in host memory (GPU learners; needs stage 3)."""


class LearnerConfig(Section):
    """The worker group that trains."""

    workers: PositiveInt = 1
    """ZeRO ranks."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one rank."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for one rank."""
    batch_size: PositiveInt = 8
    """Trajectories in one optimizer step, over all ranks (paper: 8)."""
    micro_batch_rows: PositiveInt = 8
    """Training rows in one forward of one rank; the rest of its share is accumulated."""
    logits_chunk: PositiveInt = 1024
    """Loss positions whose full-vocabulary logits exist at one time; memory, not result, depends on it."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass; same gradients, less memory."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, schedule, clipping."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding."""
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group from its last checkpoint before the run ends."""


class ObjectiveConfig(Section):
    """Which states are trained on and how far the student is from the teacher there (METHOD.md sections 4, 5)."""

    selection: Literal["one_state_per_block", "one_state_per_response", "all_states", "random_mask"] = (
        "one_state_per_block"
    )
    """Which of a trajectory's states become training rows."""
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
    max_new_tokens_per_domain: dict[str, PositiveInt] = {}
    """Length caps by a prompt's domain, in tokens (paper: math 4096, code and chat 2048, science 1024)."""


class CheckpointConfig(Section):
    """Saving and keeping."""

    every_rounds: PositiveInt = 10
    """Rounds between checkpoints; one is also written at the end and on SIGTERM or SIGINT."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay on disk."""


class EvaluationConfig(Section):
    """Exact match on held-out problems of `data.task`."""

    every_rounds: PositiveInt | None = None
    """Rounds between evaluations while training (dynamic decoding). Empty: none."""
    problems: PositiveInt = 200
    """Problems of a periodic evaluation."""
    final_problems: NonNegativeInt = 1000
    """Problems of the evaluation before and after training; 0 turns both off."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    batch_size: PositiveInt = 128
    """Problems decoded side by side."""


class ResourcesConfig(Section):
    """The Ray cluster and the patience with it."""

    ray_address: str | None = None
    """Cluster to join (`auto` inside `ray job submit`). Empty: the one in RAY_ADDRESS, else a local Ray is started."""
    local_cpus: PositiveInt | None = None
    """Logical CPUs of a Ray started here; may exceed the real ones. Empty: what the run asks for."""
    local_dashboard: bool = True
    """Serve the Ray dashboard (on 127.0.0.1) of a Ray started here."""
    worker_logs: bool = False
    """Repeat the actors' own log lines on this terminal; they are in Ray's session folder in any case."""
    actor_restarts: NonNegativeInt = 3
    """Times that each rollout or teacher actor may die and come back."""
    sample_attempts: PositiveInt = 3
    """Times that decoding and scoring a chunk of prompts is tried before the run ends with a checkpoint."""
    call_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait for one answer of an actor; then the error names who was waited for."""


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
    curriculum: CurriculumConfig = CurriculumConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
