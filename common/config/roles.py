"""The roles of a run and what each of them gets: rollout, teacher, queue, learner, and the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdlm.common.config.base import (
    Dtype,
    Grid,
    NonNegativeInt,
    OnNewWeights,
    PositiveInt,
    Probability,
    Section,
    Strategy,
)


class PlacementConfig(Section):
    """Which nodes a role's processes run on. GPUs of their own or shared ones: `gpus_per_actor`, `gpus_per_worker`."""

    accelerator_type: str | None = None
    """Kind of GPU as Ray names it (`H100`; `ray status -v` lists what there is). Empty: any."""
    node_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """What one process takes of resources that nodes were started with: `{decode: 1}` for the nodes of
    `ray start --resources='{"decode": 8}'`."""
    group: Literal["none", "pack", "spread", "strict_pack", "strict_spread"] = "none"
    """Ray placement group, which the role's processes get as a whole or not at all: `pack` on few nodes, `spread` over
    many, `strict_` on just one, or on a node each. `none`: each process where Ray finds room (Ray Train, which runs the
    learner, then packs)."""

    def resources(self, cpus: float, gpus: float) -> dict[str, float]:
        """What Ray reserves for one process, by Ray's names; nothing that is 0."""
        asked = {"CPU": cpus, "GPU": gpus} | self.node_resources
        if self.accelerator_type is not None:
            asked[f"accelerator_type:{self.accelerator_type}"] = 0.001  # Ray's own way: each such node has 1 of it
        return {name: amount for name, amount in asked.items() if amount > 0}


class RolloutConfig(Section):
    """The student's decoding (METHOD.md section 2) and the pool of actors that does it."""

    actors: PositiveInt = 1
    """Rollout actors."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor; 1 dedicates a GPU."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes."""
    prompts_per_round: PositiveInt = 128
    """Prompts decoded with one weight version (the paper: 128)."""
    prompts_per_call: PositiveInt | None = None
    """Prompts that an actor is given at a time. Empty: its share of a round. Fewer (but at least `batch_size`, or slots
    stay empty): the first are scored while the rest of a round is decoded. With `queue.max_staleness: 1` that is worth
    up to a third of a round, where decoding, scoring and training take equally long."""
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
    on_new_weights: OnNewWeights = "finish"
    """What becomes of sequences in work when new weights arrive (`queue.max_staleness` from 1 on). `finish`: they are
    decoded to their end with the old ones, the push waits. `continue`: from the next denoising step on they are decoded
    with the new ones; each token's version is recorded, a sample is as old as its oldest. What is decoded then depends
    on when a push arrives: two runs with one seed differ."""
    weight_transport: Literal["object_store", "nixl"] = "object_store"
    """How new weights come from the learner. `object_store`: through the host memory of both nodes. `nixl` (the extra
    `opdlm-ray[nixl]`, Ray Direct Transport): each actor reads them from the first rank's GPU, by NVLink, InfiniBand or
    what else UCX finds; that rank keeps a copy of each version that somebody may still read."""
    cuda_graphs: bool = False
    """Round denoising steps up to few shapes and replay each one's forward as a CUDA graph, recorded when it first
    comes: for models so small that a forward takes a GPU less time than Python takes to launch it. In bfloat16 the
    rounded shapes may give slightly other logits."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens, whatever the curriculum says; never exceeded."""


class TeacherConfig(Section):
    """Scoring by the frozen teacher (METHOD.md section 3)."""

    actors: PositiveInt = 1
    """Teacher actors."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher. `vllm` (the extra `opdlm-ray[vllm]`) gives `targets: topk` only."""
    tensor_parallel: PositiveInt = 1
    """`vllm`: GPUs of an actor that its layers are split over; `gpus_per_actor` reserves as many."""
    device_map: Literal["none", "auto"] = "none"
    """`transformers`: `auto` spreads the layers over the actor's GPUs, of one node (needs accelerate)."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor. Of a part of one, `vllm` takes as large a part of its memory."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes."""
    dtype: Dtype = "bfloat16"
    """Number format of the teacher's forward."""
    targets: Literal["hidden", "topk", "logits"] = "hidden"
    """What travels to the learner: final hidden states (exact full vocabulary), top-K, or all logits."""
    top_k: PositiveInt = 16
    """K of `targets: topk` (paper: 16 at 4B and 8B)."""
    batch_tokens: PositiveInt = 16384
    """Most tokens in one forward, padding included; a longer single trajectory goes alone (vLLM cuts it)."""


class QueueConfig(Section):
    """The replay queue between decoding and training."""

    max_staleness: NonNegativeInt = 0
    """Rounds that decoding may run ahead of training. 0: decode, score, train, push, strictly on-policy: a round takes
    their sum. At k, k + 1 rounds are on the way, and a round takes what its slowest role takes (a push is the rollout
    actors' time too), or the sum / (k + 1) where that is more; see `rollout.prompts_per_call`."""


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
    """GPUs that Ray reserves for one rank: 0 or 1, or a part of one with `workers: 1` (all roles on one GPU)."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes."""
    batch_size: PositiveInt = 8
    """Trajectories in one optimizer step, over all ranks (paper: 8)."""
    passes: PositiveInt = 1
    """Times that the trajectories of a round are trained on (paper: 1), each time in another order, and in other states
    where the selection draws them. 2 learn more from a rollout and train twice as long: worth it where decoding is what
    a round waits for. What is trained in the second pass was decoded with weights from before the first."""
    micro_batch_rows: PositiveInt = 8
    """Training rows in one forward of one rank, packed into one line; the rest of its share is accumulated."""
    logits_chunk: PositiveInt = 1024
    """Loss positions whose full-vocabulary logits exist at one time; memory, not result, depends on it."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass; same gradients, less memory."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, schedule, clipping."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding."""
    max_skipped_steps: NonNegativeInt = 3
    """Optimizer steps in a row that may be skipped because their gradient is not finite; one more ends the run."""
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group from its last checkpoint before the run ends."""


class ResourcesConfig(Section):
    """The Ray cluster and the patience with it."""

    ray_address: str | None = None
    """Cluster to join. Empty: that of RAY_ADDRESS, which Ray sets in a submitted job, else a local Ray is started."""
    local_cpus: PositiveInt | None = None
    """Logical CPUs of a Ray started here; may exceed the real ones. Empty: what the run asks for."""
    local_dashboard: bool = True
    """Serve the Ray dashboard of a Ray started here."""
    dashboard_host: str = "127.0.0.1"
    """Address that this dashboard listens on. One that other machines reach needs Ray's token authentication, which is
    on unless RAY_AUTH_MODE says otherwise: whoever reaches the dashboard can run code."""
    worker_logs: bool = False
    """Repeat the actors' own log lines on this terminal; they are in Ray's session folder in any case."""
    actor_restarts: NonNegativeInt = 3
    """Times that each rollout or teacher actor may die and come back."""
    sample_attempts: PositiveInt = 3
    """Times that decoding and scoring a chunk of prompts is tried before the run ends with a checkpoint."""
    call_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait for one answer of an actor; then the error names who was waited for."""
