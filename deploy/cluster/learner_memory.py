"""The memory of one learner rank (one ZeRO process), as arithmetic that `opdlm plan` prints; see `memory.py`."""

from __future__ import annotations

from pathlib import Path

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES
from opdlm.common.config.schema import LoraConfig
from opdlm.common.model.shards import read_shards
from opdlm.deploy.cluster.memory import Lengths, ModelSize, RoleMemory, Term, process_terms, weights_term
from opdlm.learner.row_attention import PIECE

BUCKET_ELEMENTS = 500_000_000
"""Elements of a gradient bucket: DeepSpeed's default of `reduce_bucket_size`."""
LIVE_PARAMETERS = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered at one time: DeepSpeed's default of `stage3_max_live_parameters`."""


def learner_memory(
    config: OpdlmConfig, student: ModelSize, teacher: ModelSize, adapters: int | None, lengths: Lengths
) -> RoleMemory:
    """The memory of one ZeRO rank, the first: see `learner/zero.py`, `learner/distill.py`, `learner/saving.py`, and
    `WeightPacker` for the push.

    `adapters`: parameters that LoRA trains; None: all weights are trained.
    """
    learner, size = config.learner, DTYPE_BYTES[config.model.dtype]
    direct = config.rollout.weight_transport == "nixl"
    versions = config.queue.max_staleness + 2 if direct else 1  # actors may still read the older ones
    pushed = f"{student.pushed:,} x {size} B{f' x {versions} versions' if direct else ''}, the first rank only"
    on_gpu = learner.gpus_per_worker > 0
    largest = f"the largest tensor, {student.vocabulary:,} x {student.width:,} x 4 B, the first rank only"
    return RoleMemory(
        "learner",
        learner.gpus_per_worker,
        [
            *process_terms("learner", learner.gpus_per_worker, student.parameters * size),
            *zero_terms(config, student.parameters + (adapters or 0), adapters or student.parameters),
            *_activations(config, student, lengths, size),
            *_losses(config, student, teacher, trains_matrix=adapters is None),
            Term("packed weights", pushed, student.pushed * size * versions, False, on_gpu and not direct, True),
            Term("a checkpoint", largest, student.vocabulary * student.width * 4, False, on_gpu, True),
            Term(
                "the finished student",
                f"written at the end, {student.parameters:,} x {size} B, the first rank only",
                student.parameters * size,
                on_host=on_gpu,
                first_rank_only=True,
            ),
        ],
    )


def zero_terms(config: OpdlmConfig, held: int, trained: int) -> list[Term]:
    """Weights, gradients, master weights and optimizer moments of one rank.

    Stage 1 shards the float32 master weights and AdamW's two moments, stage 2 also the gradients (summed in float32),
    stage 3 also the weights (frozen ones too). A partition is rounded up. On a learner with a GPU,
    `offload_optimizer` moves master weights, moments and (from stage 2 on) gradients to host memory, `offload_weights`
    the weights.

    Args:
        held: parameters of the model, adapters included.
        trained: parameters that have a gradient.
    """
    learner, size = config.learner, DTYPE_BYTES[config.model.dtype]
    zero, ranks = learner.zero, learner.workers
    offload = learner.gpus_per_worker > 0 and zero.offload_optimizer
    part = -(-trained // ranks)
    terms = [weights_term(held, config.model.dtype, ranks if zero.stage == 3 else 1, "ranks")]
    if learner.gpus_per_worker > 0 and zero.offload_weights:
        terms = [Term(t.what, t.arithmetic, t.nbytes, on_host=True) for t in terms]
    if zero.stage == 1:
        terms.append(Term("gradients", f"{trained:,} x {size} B", trained * size))
        terms.append(Term("the step's gradients, fp32", f"{trained:,} / {ranks} ranks x 4 B", part * 4))
    else:
        terms.append(Term("gradients, fp32", f"{trained:,} / {ranks} ranks x 4 B", part * 4, on_host=offload))
    terms += [
        Term("masters, fp32", f"{trained:,} / {ranks} ranks x 4 B", part * 4, on_host=offload),
        Term("AdamW moments, fp32", f"{trained:,} / {ranks} ranks x 2 x 4 B", part * 8, on_host=offload),
    ]
    if learner.gpus_per_worker > 0:
        buffers = 1 if zero.stage == 3 else 2  # stages 1 and 2 fill one while the other is reduced (overlap_comm)
        what = f"DeepSpeed's, {BUCKET_ELEMENTS:,} x {size} B x {buffers}"
        terms.append(Term("gradient buckets", what, BUCKET_ELEMENTS * size * buffers))
    if zero.stage == 3:
        live = min(held, LIVE_PARAMETERS)
        terms.append(Term("gathered weights", f"at most {live:,} x {size} B", live * size, estimate=True))
    return terms


def activation_values(size: ModelSize) -> int:
    """About how many numbers one layer keeps per token for its backward pass.

    They are: two norms (input in float32, normalised and scaled), q, k, v before and after norm and rotation, the
    attention's output, and in the MLP the gate, its activation, up and the product.
    """
    heads = (size.heads + 2 * size.kv_heads) * size.head_dim
    return 8 * size.width + 3 * heads + size.heads * size.head_dim + 4 * size.intermediate


def _activations(config: OpdlmConfig, student: ModelSize, lengths: Lengths, size: int) -> list[Term]:
    learner = config.learner
    tokens = max(learner.micro_batch_tokens, lengths.row)
    values, layers = activation_values(student), student.layers
    shape = f"{tokens:,} tokens"
    if learner.gradient_checkpointing:
        what = f"{shape} x ({layers} layers x {student.width:,} + {values:,}) x {size} B"
        terms = [Term("activations", what, tokens * (layers * student.width + values) * size, estimate=True)]
    else:
        what = f"{shape} x {layers} layers x {values:,} x {size} B"
        terms = [Term("activations", what, tokens * layers * values * size, estimate=True)]
    on_gpu = learner.gpus_per_worker > 0
    if config.model.attention == "sdpa" or (config.model.attention == "auto" and not on_gpu):
        number = size if on_gpu else DTYPE_BYTES["float32"]  # a CPU computes attention in float32
        keys = min(lengths.row, lengths.row // 4 + 3 * PIECE // 2)  # a long row's pieces see half of the row on average
        what = f"{tokens:,} tokens x {keys:,} keys x {number} B"
        terms.append(Term("attention masks", what, tokens * keys * number, estimate=True))
    return terms


def _losses(config: OpdlmConfig, student: ModelSize, teacher: ModelSize, trains_matrix: bool) -> list[Term]:
    """The loss in chunks (`learner/chunked_loss.py`), and the teacher's output matrix if targets are hidden states."""
    chunk, terms = config.learner.logits_chunk, []
    scored = config.objective.asks_teacher
    if scored and config.teacher.targets == "hidden":
        size = DTYPE_BYTES[config.teacher.dtype]
        what = f"{teacher.vocabulary:,} x {teacher.width:,} x {size} B"
        terms.append(Term("teacher's output matrix", what, teacher.vocabulary * teacher.width * size))
    # With top-K targets, only the student's logits have V columns.
    models = 2 if scored and config.teacher.targets != "topk" else 1
    what = f"{chunk:,} positions x {student.vocabulary:,} x 4 B" + (" x 2" if models == 2 else "")
    terms.append(Term("logits chunk", what, chunk * student.vocabulary * 4 * models))
    what = f"{chunk:,} positions x {student.vocabulary:,} x 4 B x 2"
    terms.append(Term("its gradient", what, chunk * student.vocabulary * 8, estimate=True))
    if trains_matrix and config.learner.zero.stage > 1:  # at stage 1 it is among the gradients
        size = DTYPE_BYTES[config.model.dtype]
        what = f"{student.vocabulary:,} x {student.width:,} x {size} B"
        terms.append(Term("output matrix's gradient", what, student.vocabulary * student.width * size))
    return terms


def adapter_parameters(folder: str | Path, lora: LoraConfig) -> int:
    """Number of parameters of the adapters: `rank x (in + out)` for every linear layer that gets one."""
    shards = read_shards(folder)
    layers = [
        shards.shape(name)
        for name in shards.file_of
        if ".layers." in name and name.endswith(".weight") and name.split(".")[-2] in lora.target_modules
    ]
    return sum(lora.rank * sum(shape) for shape in layers if len(shape) == 2)
