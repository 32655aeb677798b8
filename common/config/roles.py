"""The settings of the roles of a run: rollout, teacher, queue, learner."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdlm.common.config.base import (
    Confidence,
    Dtype,
    Grid,
    NonNegativeInt,
    Number,
    OnNewWeights,
    PositiveInt,
    Probability,
    Section,
    Strategy,
    Switch,
    ZeroStage,
)

DecayRate = Annotated[Number, Field(ge=0, lt=1)]


class PlacementConfig(Section):
    """Which nodes the processes of a role run on.

    Whether a process has a GPU of its own or shares one is set by the role's `gpus_per_actor` or `gpus_per_worker`.
    """

    accelerator_type: str | None = None
    """Kind of GPU that the nodes must have, by Ray's name for it, for example `H100` (`ray status -v` lists the names).
    Empty: any kind."""
    node_resources: dict[str, Annotated[Number, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that one process takes, so that it runs only on nodes that have them: `{decode: 1}` for
    nodes that were started with `ray start --resources='{"decode": 8}'`. Empty: none."""
    group: Literal["none", "pack", "spread", "strict_pack", "strict_spread"] = "none"
    """Ray placement group of the role's processes; Ray reserves room for all of them or for none. `pack`: on as few
    nodes as possible. `spread`: over as many nodes as possible. `strict_pack`: all on one node. `strict_spread`: each
    on a node of its own. `none`: no group; Ray starts each process where it finds room (Ray Train packs the
    learner's)."""

    def resources(self, cpus: float, gpus: float) -> dict[str, float]:
        """What Ray reserves for one process: amount by Ray's name of the resource, without amounts of 0."""
        asked = {"CPU": cpus, "GPU": gpus} | self.node_resources
        if self.accelerator_type is not None:
            asked[f"accelerator_type:{self.accelerator_type}"] = 0.001  # Ray gives each node of the kind 1 of it
        return {name: amount for name, amount in asked.items() if amount > 0}


class RolloutConfig(Section):
    """How the student decodes (METHOD.md section 2), and the pool of rollout actors."""

    actors: PositiveInt = 1
    """Number of rollout actors. Each holds a copy of the student."""
    cpus_per_actor: Annotated[Number, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor, and the number of threads that torch uses in it."""
    gpus_per_actor: Annotated[Number, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor: 0 decodes on the CPU, 1 gives it a GPU of its own, a part of 1 shares a GPU
    with other processes."""
    placement: PlacementConfig = PlacementConfig()
    """Which nodes the rollout actors run on."""
    prompts_per_round: PositiveInt = 128
    """Number of prompts that are decoded with one weight version (paper: 128). Training on them gives the next
    version."""
    responses_per_prompt: PositiveInt = 1
    """Number of responses that are decoded to each prompt, each with a seed of its own (Diffusion-GR2: 4 for
    distillation, 8 for `rl`). Each counts as a sample: a round has `prompts_per_round` times as many, and
    `learner.batch_size` counts responses."""
    batch_size: PositiveInt = 64
    """Number of sequences that one actor decodes at the same time (its slots). When a sequence ends, it goes to a
    teacher, and its slot takes the next prompt once enough slots have idled to pay for reading the prompt. Lower it
    where the actor runs out of memory."""
    cache_tokens: PositiveInt | None = None
    """Size of an actor's key/value cache: the number of tokens, of prompts and responses so far, that all its sequences
    together may have. Sequences begin while it has room; where they grow until it is full, the one that began last is
    put back and decoded again later. So `batch_size` may be as high as typical lengths allow, and memory does not
    depend on the longest response; far more slots than the cache has room for waste what is put back. It must hold the
    longest request, of training and evaluation. Empty: the cache grows with its sequences, at most to `batch_size`
    times the longest."""
    block_size: PositiveInt = 4
    """Number of tokens in a block (paper: 4). Decoding and training use the same size."""
    block_grid: Grid = "absolute"
    """Where blocks begin. `absolute`: blocks are counted from the prompt's first token, as serving engines for SDAR
    models do, so the prompt's last tokens may share a block with the response. `response`: the response starts a new
    block."""
    denoising_steps: PositiveInt | None = None
    """Number of denoising steps in which a block is revealed at the latest: each step reveals at least the block's
    masks divided by its remaining steps (`entropy_bounded`: at least one). At most `block_size`. Empty: `block_size`,
    so at least one token per step."""
    strategy: Strategy = "low_confidence_dynamic"
    """Remasking strategy: which masked positions a denoising step reveals. `low_confidence_static`: the k of highest
    confidence, where k divides the block's masks over its remaining steps. `low_confidence_dynamic`: every position
    above `threshold`, and at least k. `entropy_bounded`: positions of rising entropy within `entropy_budget`.
    `sequential`: the k leftmost. `sequential_dynamic`: every position above `threshold`, and the k leftmost. `random`:
    k at random."""
    threshold: Probability = 0.9
    """With the dynamic strategies, the confidence above which a position is revealed, between 0 and 1. Lower values
    reveal more tokens per step. `curriculum.threshold` replaces it where it is set."""
    entropy_budget: Annotated[Number, Field(ge=0)] = 0.1
    """With `entropy_bounded`, the sum of the entropies, in nats, of the positions that one step may reveal. Higher
    values reveal more tokens per step."""
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    """Sampling temperature of the candidate tokens; 0 is greedy decoding. Confidence is always taken from the softmax
    without temperature."""
    confidence: Confidence | None = None
    """What a masked position's confidence is. `sampled`: the probability of its candidate (the paper).
    `max_probability`: the largest probability of any token, so that positions are chosen without a look at what was
    drawn; then what is revealed is a draw from the policy, as `objective.kind: rl` needs. Greedy decoding has the same
    for both. Empty: `max_probability` with `rl`, else `sampled`."""
    top_k: NonNegativeInt = 0
    """Candidates are drawn from the k likeliest tokens only. 0: from all tokens."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Candidates are drawn from the smallest set of tokens whose probabilities sum to this value. 1: from all
    tokens."""
    on_new_weights: OnNewWeights = "finish"
    """What happens to sequences that are being decoded when new weights arrive (only with `queue.max_staleness` of 1 or
    more). `finish`: they are decoded to their end with the old weights, and the new ones wait. `continue`: from the
    next denoising step on they are decoded with the new weights; the version of each token is recorded, and a sample is
    as stale as its oldest token. With `continue` the rollouts depend on when weights arrive, so two runs with one seed
    differ."""
    weight_transport: Literal["object_store", "nixl"] = "object_store"
    """How new weights get from the learner to the rollout actors. `object_store`: through the host memory of both
    nodes; works everywhere. `nixl` (Ray Direct Transport; needs the extra `opdlm-ray[nixl]`): each actor reads them
    from the GPU of the learner's first rank, over NVLink, InfiniBand or whatever else UCX finds; that rank keeps a copy
    of each version that an actor may still read."""
    cuda_graphs: Switch = False
    """Run denoising steps as CUDA graphs. Batches are rounded up to a few shapes, and the forward of each shape is
    recorded when it first occurs and replayed afterwards. Turn it on for models that are so small that the GPU finishes
    a forward before Python has launched it. In bfloat16 the rounded shapes may give slightly different logits."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens. No response exceeds it, whatever the curriculum and the data say."""

    @property
    def samples_per_round(self) -> int:
        """Responses of a round."""
        return self.prompts_per_round * self.responses_per_prompt


class TeacherConfig(Section):
    """How the frozen teacher scores trajectories (METHOD.md section 3), and the pool of teacher actors."""

    actors: PositiveInt = 1
    """Number of teacher actors. Each holds a copy of the teacher."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the teacher. `vllm` needs the extra `opdlm-ray[vllm]` and supports `targets: topk` only."""
    tensor_parallel: PositiveInt = 1
    """With `backend: vllm`, the number of GPUs over which an actor splits each layer. Set `gpus_per_actor` to the same
    number. 1: the teacher fits on one GPU."""
    device_map: Literal["none", "auto"] = "none"
    """With `backend: transformers`, how the teacher uses an actor's GPUs. `none`: it is on one device. `auto`: its
    layers are spread over the actor's GPUs, all on one node (needs the extra `opdlm-ray[device-map]`)."""
    cpus_per_actor: Annotated[Number, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one actor, and the number of threads that torch uses in it."""
    gpus_per_actor: Annotated[Number, Field(ge=0)] = 0
    """GPUs that Ray reserves for one actor: 0 scores on the CPU, 1 gives it a GPU of its own, a part of 1 shares a GPU
    with other processes (`vllm` then takes the same part of the GPU's memory). More than 1 needs `device_map: auto` or
    `tensor_parallel`."""
    placement: PlacementConfig = PlacementConfig()
    """Which nodes the teacher actors run on."""
    dtype: Dtype = "bfloat16"
    """Number format of the teacher's weights and of its forward."""
    targets: Literal["hidden", "topk", "logits"] = "hidden"
    """What the teacher sends to the learner for each response token. `hidden`: its final hidden state, from which the
    learner computes the exact distribution over the full vocabulary with the teacher's output matrix. `topk`: the
    log-probabilities of the K likeliest tokens. `logits`: all logits, for small vocabularies and tests."""
    top_k: PositiveInt = 16
    """With `targets: topk`, the number K of tokens that are sent for each position (paper: 16 at 4B and 8B)."""
    batch_tokens: PositiveInt = 16384
    """Largest number of tokens in one forward, padding included. A trajectory that is longer than this gets a forward
    of its own (vLLM splits it into parts). Lower it where the actor runs out of memory."""


class QueueConfig(Section):
    """The replay queue, which holds scored trajectories between decoding and training."""

    max_staleness: NonNegativeInt = 0
    """Number of rounds that decoding may run ahead of training. 0: strictly on-policy; decoding with scoring, training
    and the push of weights take turns, and a round takes the sum of their times. k: up to k + 1 rounds are in progress
    at once, and a round takes as long as its slowest role (the rollout actors both decode and load weights), or the
    sum divided by k + 1 where that is longer. Raise it to 1 or 2 where roles wait for each other."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[Number, Field(gt=0)] = 1e-5
    """Peak learning rate, reached after the warm-up (paper: 1e-5)."""
    min_lr_ratio: Probability = 0.1
    """With `schedule: cosine`, the learning rate at the end of the run as a share of `lr` (paper: 0.1, so 1e-6)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate changes after the warm-up. `cosine`: it falls from `lr` to `min_lr_ratio` times `lr` by the
    last step of the run. `constant`: it stays at `lr`."""
    warmup_steps: NonNegativeInt = 5
    """Number of optimizer steps in which the learning rate rises linearly to `lr` (paper: 5)."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment (paper: 0.9, 0.999)."""
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    """AdamW's epsilon, added to the denominator of the update."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay; 0 is none (paper: none)."""
    grad_clip: Annotated[Number, Field(ge=0)] = 1.0
    """Largest global gradient norm; a larger gradient is scaled down to it (paper: 1.0). 0 turns clipping off."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO: what the learner's ranks share out among them, and what is kept in host memory."""

    stage: ZeroStage = 2
    """ZeRO stage. 1 shards the optimizer's state over the ranks, 2 also the gradients, 3 also the weights. Raise it
    where a rank runs out of GPU memory; 3 costs the most communication."""
    offload_optimizer: Switch = False
    """Keep the optimizer's state in host memory: less GPU memory, slower steps. A learner on the CPU ignores it."""
    offload_weights: Switch = False
    """Keep the sharded weights in host memory; needs `stage: 3`. A learner on the CPU ignores it."""


class LearnerConfig(Section):
    """The worker group that trains the student."""

    workers: PositiveInt = 1
    """Number of ranks: worker processes that train together, each with a share of every batch."""
    cpus_per_worker: Annotated[Number, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for one rank, and the number of threads that torch uses in it."""
    gpus_per_worker: Annotated[Number, Field(ge=0)] = 0
    """GPUs that Ray reserves for one rank: 0 trains on the CPU, 1 gives it a GPU of its own. A part of 1 is possible
    with `workers: 1` only, so that all roles can share one GPU."""
    placement: PlacementConfig = PlacementConfig()
    """Which nodes the ranks run on."""
    batch_size: PositiveInt = 8
    """Number of trajectories in one optimizer step, over all ranks together (paper: 8). At least `workers` and at most
    `rollout.prompts_per_round`."""
    passes: PositiveInt = 1
    """Number of times that each round's trajectories are trained on (paper: 1). Every pass has another order, and other
    states where the selection draws them. Set it to 2 where decoding takes the most time: the run learns more from each
    rollout and trains twice as long. The second pass is less on-policy, because the first one has changed the weights
    since the trajectories were decoded."""
    micro_batch_tokens: PositiveInt = 16384
    """Largest number of tokens in one forward of one rank; gradients of the further rows are accumulated. A training
    row of P prompt and R response tokens has P + 2R tokens, and a row that is longer than this gets a forward of its
    own. So the memory of a step follows this number, however long the responses are. Lower it where a rank runs out of
    memory; the result does not depend on it."""
    logits_chunk: PositiveInt = 1024
    """Number of loss positions whose full-vocabulary logits are in memory at the same time. Lower it where a rank runs
    out of memory; the result does not depend on it."""
    gradient_checkpointing: Switch = False
    """Recompute each layer in the backward pass instead of keeping its activations: the same gradients with less memory
    and more computation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its learning-rate schedule and gradient clipping."""
    zero: ZeroConfig = ZeroConfig()
    """DeepSpeed ZeRO: sharding and offloading."""
    max_skipped_steps: NonNegativeInt = 3
    """Number of optimizer steps in a row that may be skipped because their gradient is not finite. One more ends the
    run."""
    max_failures: NonNegativeInt = 3
    """Number of times that the worker group is restarted from its last checkpoint after a failure. One more failure
    ends the run."""
