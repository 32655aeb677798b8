"""Memory of each role, as arithmetic that is printed with its result. Reads config.json and headers, never weights.

Every `Term` is one allocation that the code makes (the docstring of the function that adds it says where). Terms marked
`estimate` are rules of thumb or upper bounds; the CUDA context (about 0.5 GiB a process) and fragmentation are not in.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdlm.actors.rollout.decoder import PREFILL_TOKENS
from opdlm.actors.teacher.scoring import LOGITS_CHUNK
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES
from opdlm.common.config.schema import LoraConfig
from opdlm.common.model.config import read_config
from opdlm.common.model.facts import count_parameters
from opdlm.common.model.shards import read_shards

BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, which the run does not change: elements of a gradient bucket."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: most parameters that ZeRO-3 keeps whole at one time."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the memory of a model follows from."""

    parameters: int
    layers: int
    width: int
    """Hidden size D."""
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def with_rows(self, rows: int, tied: bool) -> ModelSize:
        """The size with more rows in embedding and output matrix (a mask token that conversion adds)."""
        added = rows * self.width * (1 if tied else 2)
        return replace(self, parameters=self.parameters + added, vocabulary=self.vocabulary + rows)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest sequence of the run, in tokens."""

    prompt: int
    end: int
    """Prompt and response, to the end of the last block."""
    row: int
    """A training row `[clean | noisy]`: P + 2R and the prompt's share of the first block (METHOD.md section 4)."""


@dataclass(frozen=True, slots=True)
class Term:
    """One allocation of one process."""

    what: str
    arithmetic: str
    nbytes: int
    estimate: bool = False
    on_host: bool = False
    """Offloaded: in host memory although the role has a GPU."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """All allocations of one process of a role, and the GPUs that it has."""

    role: str
    gpus: float
    terms: list[Term]

    @property
    def device_bytes(self) -> int:
        """Bytes on the GPU of one process; in its own memory where it has no GPU."""
        return sum(term.nbytes for term in self.terms if not term.on_host)

    @property
    def host_bytes(self) -> int:
        """Bytes that are offloaded to host memory."""
        return sum(term.nbytes for term in self.terms if term.on_host)


def model_size(folder: str | Path) -> ModelSize:
    """Size of a checkpoint folder, from its config.json and the headers of its weight files.

    Raises:
        OpdlmError: an unusable folder.
    """
    config = read_config(folder)
    return ModelSize(
        parameters=count_parameters(folder),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
    )


def adapter_parameters(folder: str | Path, lora: LoraConfig) -> int:
    """Parameters of the adapters, `rank x (in + out)` for every linear layer that gets one."""
    shards = read_shards(folder)
    layers = [
        shards.shape(name)
        for name in shards.file_of
        if ".layers." in name and name.endswith(".weight") and name.split(".")[-2] in lora.target_modules
    ]
    return sum(lora.rank * sum(shape) for shape in layers if len(shape) == 2)


def rollout_memory(config: OpdlmConfig, student: ModelSize, lengths: Lengths) -> RoleMemory:
    """A rollout actor: `actors/rollout/kv_cache.py` and `_step` of `actors/rollout/decoder.py`."""
    rollout, size = config.rollout, DTYPE_BYTES[config.model.dtype]
    slots = min(rollout.batch_size, -(-rollout.prompts_per_round // rollout.actors))
    longest = lengths.end if rollout.on_new_weights == "continue" else lengths.prompt
    tokens = max(min(slots * longest, PREFILL_TOKENS), longest)
    cache = slots * lengths.end * student.layers * 2 * student.kv_heads * student.head_dim * size
    return RoleMemory(
        "rollout",
        rollout.gpus_per_actor,
        [
            _weights(student.parameters, config.model.dtype),
            *_arriving(config, student.parameters * size),
            Term(
                "key/value cache",
                f"{slots} slots x {lengths.end:,} positions x {student.layers} layers x 2 x "
                f"{student.kv_heads} heads x {student.head_dim} x {size} B",
                cache,
            ),
            Term(
                "logits of a step",
                f"{slots} slots x block {rollout.block_size} x {student.vocabulary:,} x 4 B",
                slots * rollout.block_size * student.vocabulary * 4,
            ),
            _sampling(config, slots, student.vocabulary),
            _forward(student, tokens, size, f"prefill of {tokens:,} tokens"),
        ],
    )


def _arriving(config: OpdlmConfig, nbytes: int) -> list[Term]:
    """With `nixl`, new weights beside those in use; the object store's memory is the node's."""
    if config.rollout.weight_transport != "nixl":
        return []
    return [Term("weights that arrive", "as much again, during a push", nbytes)]


def _sampling(config: OpdlmConfig, slots: int, vocabulary: int) -> Term:
    """`actors/rollout/sampling.py`: probabilities in fp32 and their cumulative sum in fp64; greedy needs neither."""
    each = 12 if config.rollout.temperature else 0
    count = slots * config.rollout.block_size
    what = f"{slots} slots x block {config.rollout.block_size} x {vocabulary:,} x {each} B"
    return Term("sampling from them", what, count * vocabulary * each, estimate=True)


def teacher_memory(config: OpdlmConfig, teacher: ModelSize, lengths: Lengths) -> RoleMemory:
    """A teacher actor: `actors/teacher/scoring.py`. Layers split over several GPUs are counted as split evenly."""
    settings = config.teacher
    size, parts = DTYPE_BYTES[settings.dtype], max(1, math.ceil(settings.gpus_per_actor))
    tokens = max(settings.batch_tokens, lengths.end)
    terms = [_weights(teacher.parameters, settings.dtype, parts, "GPUs")]
    if settings.backend == "vllm":
        what = "vLLM takes the rest of its share of the GPU for its own cache"
        return RoleMemory("teacher", settings.gpus_per_actor, [*terms, Term("cache", what, 0)])
    terms += [
        Term("hidden states", f"{tokens:,} tokens x {teacher.width:,} x {size} B", tokens * teacher.width * size),
        _forward(teacher, tokens, size, f"forward of {tokens:,} tokens"),
    ]
    if settings.targets == "topk":  # float32 logits and their log-softmax
        what = f"{LOGITS_CHUNK:,} positions x {teacher.vocabulary:,} x 4 B x 2"
        terms.append(Term("logits chunk", what, LOGITS_CHUNK * teacher.vocabulary * 8))
    elif settings.targets == "logits":  # all of a response's, and once more while its chunks are joined
        response = lengths.end - lengths.prompt
        what = f"{response:,} positions x {teacher.vocabulary:,} x 4 B x 2"
        terms.append(Term("logits of a response", what, response * teacher.vocabulary * 8))
    return RoleMemory("teacher", settings.gpus_per_actor, terms)


def learner_memory(
    config: OpdlmConfig, student: ModelSize, teacher: ModelSize, adapters: int | None, lengths: Lengths
) -> RoleMemory:
    """One ZeRO rank: `learner/zero.py`, `learner/distill.py`, `WeightPacker`. `adapters`: what LoRA trains, or None."""
    learner, size = config.learner, DTYPE_BYTES[config.model.dtype]
    direct = config.rollout.weight_transport == "nixl"
    versions = config.queue.max_staleness + 2 if direct else 1  # those before may still be read
    pushed = f"{student.parameters:,} x {size} B{f' x {versions} versions' if direct else ''}, the first rank only"
    on_host = learner.gpus_per_worker > 0 and not direct
    return RoleMemory(
        "learner",
        learner.gpus_per_worker,
        [
            *zero_terms(config, student.parameters + (adapters or 0), adapters or student.parameters),
            *_activations(config, student, lengths, size),
            *_losses(config, student, teacher, trains_matrix=adapters is None),
            Term("packed weights", pushed, student.parameters * size * versions, on_host=on_host),
        ],
    )


def zero_terms(config: OpdlmConfig, held: int, trained: int) -> list[Term]:
    """Weights, gradients, masters and moments of one rank.

    Args:
        held: parameters of the model, adapters included; trained: those with a gradient.

    Stage 1 shards float32 masters and AdamW's two moments, stage 2 gradients too (summed in float32), stage 3 weights
    too (frozen ones as well). A partition is rounded up. Offloading moves them to host memory (GPU learners only).
    """
    learner, size = config.learner, DTYPE_BYTES[config.model.dtype]
    zero, ranks = learner.zero, learner.workers
    offload = learner.gpus_per_worker > 0 and zero.offload_optimizer
    part = -(-trained // ranks)
    terms = [_weights(held, config.model.dtype, ranks if zero.stage == 3 else 1, "ranks")]
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
        what = f"DeepSpeed's, {BUCKET:,} x {size} B x {buffers}"
        terms.append(Term("gradient buckets", what, BUCKET * size * buffers))
    if zero.stage == 3:
        live = min(held, LIVE)
        terms.append(Term("gathered weights", f"at most {live:,} x {size} B", live * size, estimate=True))
    return terms


def activation_values(size: ModelSize) -> int:
    """Numbers that one layer keeps of one token for its backward pass, about.

    Two norms (input in float32, normalised and scaled), q, k, v before and after norm and rotation, attention's
    output, and the MLP's gate, its activation, up and their product.
    """
    heads = (size.heads + 2 * size.kv_heads) * size.head_dim
    return 8 * size.width + 3 * heads + size.heads * size.head_dim + 4 * size.intermediate


def _activations(config: OpdlmConfig, student: ModelSize, lengths: Lengths, size: int) -> list[Term]:
    learner = config.learner
    tokens = learner.micro_batch_rows * lengths.row
    values, layers = activation_values(student), student.layers
    shape = f"{learner.micro_batch_rows} x {lengths.row:,} tokens"
    if learner.gradient_checkpointing:
        what = f"{shape} x ({layers} layers x {student.width:,} + {values:,}) x {size} B"
        terms = [Term("activations", what, tokens * (layers * student.width + values) * size, estimate=True)]
    else:
        what = f"{shape} x {layers} layers x {values:,} x {size} B"
        terms = [Term("activations", what, tokens * layers * values * size, estimate=True)]
    on_gpu = learner.gpus_per_worker > 0
    if config.model.attention == "sdpa" or (config.model.attention == "auto" and not on_gpu):
        rows, clean, noisy = learner.micro_batch_rows, lengths.end, lengths.row - lengths.end
        what = f"{rows} rows x ({clean:,} x {clean:,} + {noisy:,} x {clean + noisy:,}) x {size} B"
        terms.append(Term("attention masks", what, rows * (clean**2 + noisy * (clean + noisy)) * size))
    return terms


def _losses(config: OpdlmConfig, student: ModelSize, teacher: ModelSize, trains_matrix: bool) -> list[Term]:
    """`learner/chunked_loss.py`, and the teacher's output matrix where targets are hidden states."""
    chunk, terms = config.learner.logits_chunk, []
    scored = config.objective.kind != "cft"
    if scored and config.teacher.targets == "hidden":
        size = DTYPE_BYTES[config.teacher.dtype]
        what = f"{teacher.vocabulary:,} x {teacher.width:,} x {size} B"
        terms.append(Term("teacher's output matrix", what, teacher.vocabulary * teacher.width * size))
    both = 2 if scored and config.teacher.targets != "topk" else 1  # of top-K targets the student alone has V columns
    what = f"{chunk:,} positions x {student.vocabulary:,} x 4 B" + (" x 2" if both == 2 else "")
    terms.append(Term("logits chunk", what, chunk * student.vocabulary * 4 * both))
    what = f"{chunk:,} positions x {student.vocabulary:,} x 4 B x 2"
    terms.append(Term("its gradient", what, chunk * student.vocabulary * 8, estimate=True))
    if trains_matrix and config.learner.zero.stage > 1:  # at stage 1 it is one of the gradients that are kept
        size = DTYPE_BYTES[config.model.dtype]
        what = f"{student.vocabulary:,} x {student.width:,} x {size} B"
        terms.append(Term("output matrix's gradient", what, student.vocabulary * student.width * size))
    return terms


def _weights(parameters: int, dtype: str, parts: int = 1, of: str = "") -> Term:
    size = DTYPE_BYTES[dtype]
    split = f" / {parts} {of}" if parts > 1 else ""
    return Term("weights", f"{parameters:,}{split} x {size} B ({dtype})", -(-parameters // parts) * size)


def _forward(size: ModelSize, tokens: int, item: int, what: str) -> Term:
    """The widest moment of a forward without gradient: residual, normed input, gate, up and their product."""
    values = 2 * size.width + 3 * size.intermediate
    return Term("activations", f"{what} x {values:,} x {item} B", tokens * values * item, estimate=True)


def to_plain(memory: RoleMemory) -> dict[str, Any]:
    """The same figures for JSON, in bytes."""
    return {
        "role": memory.role,
        "gpus": memory.gpus,
        "device_bytes": memory.device_bytes,
        "host_bytes": memory.host_bytes,
        "terms": [asdict(term) for term in memory.terms],
    }
