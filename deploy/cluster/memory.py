"""The memory of rollout and teacher actors, as arithmetic that `opdlm plan` prints with its result. Loads no weights.

Every `Term` is one allocation in the code; the docstring of the function that adds the term says where. Terms marked
`estimate` are rules of thumb, upper bounds or measured. The CUDA context (about 0.5 GiB per process) and fragmentation
are not counted. The learner's memory is in `learner_memory.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdlm.actors.rollout.forward import PREFILL_TOKENS
from opdlm.actors.rollout.kv_cache import SPARE
from opdlm.actors.teacher.scoring import LOGITS_CHUNK
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import DTYPE_BYTES
from opdlm.common.model.config import head_width, read_config
from opdlm.common.model.facts import count_parameters


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model that its memory depends on."""

    parameters: int
    layers: int
    width: int
    """Hidden size D."""
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    adapters: int | None = None
    """Parameters of adapters on noisy tokens, which alone a push moves; None: it moves the whole model."""

    @property
    def pushed(self) -> int:
        """Parameters that a push moves."""
        return self.parameters if self.adapters is None else self.adapters

    def with_rows(self, rows: int, tied: bool) -> ModelSize:
        """The size with more rows in embedding and output matrix (`tied`: one matrix), as for a mask token."""
        added = rows * self.width * (1 if tied else 2)
        return replace(self, parameters=self.parameters + added, vocabulary=self.vocabulary + rows)


@dataclass(frozen=True, slots=True)
class Lengths:
    """The longest sequences of the run, in tokens."""

    prompt: int
    end: int
    """Prompt and response, up to the end of the last block."""
    row: int
    """A training row `[clean | noisy]`: P + 2R, plus the prompt tokens that share the first response block (METHOD.md
    section 4); with drafts of S masks at most P + R (1 + S)."""
    question: int = 0
    """A question of the run's evaluations and its answer, up to the end of the last block; 0: there are none."""
    drafts: int = 0
    """Masks in a draft of the strategy `verified`; 0: it decodes blocks."""

    @property
    def response(self) -> int:
        """The longest response, up to the end of its last block."""
        return (self.row - self.prompt) // (1 + self.drafts) if self.drafts else self.row - self.end


@dataclass(frozen=True, slots=True)
class Term:
    """One allocation of one process."""

    what: str
    arithmetic: str
    nbytes: int
    estimate: bool = False
    on_host: bool = False
    """Whether it is in host memory although the role has a GPU."""
    first_rank_only: bool = False
    """Whether only the first of several ranks has it."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """All allocations of one process of a role."""

    role: str
    gpus: float
    """GPUs of the process."""
    terms: list[Term]

    @property
    def device_bytes(self) -> int:
        """Bytes on each GPU of the process; without a GPU, in its own memory."""
        return sum(term.nbytes for term in self.terms if not term.on_host)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory of a process that has a GPU."""
        return sum(term.nbytes for term in self.terms if term.on_host)

    def on_its_node(self, first_rank: bool = False) -> int:
        """Bytes of a process in the host memory of its node. `first_rank`: what the first rank has more than others."""
        terms = [term for term in self.terms if term.on_host or not self.gpus]
        return sum(term.nbytes for term in terms if term.first_rank_only == first_rank)


PROCESS_MIB = {"rollout": 600, "teacher": 600, "reward": 600, "reference": 600, "learner": 700}
"""Host memory that Python, torch, Ray and the libraries of a role take in each of its processes, whatever the model:
resident memory, rounded up. Measured with a model of a few thousand parameters on CPUs: 489, 484 and 635 MiB
(tests/benchmarks/process_memory.py)."""
DRIVER_MIB = 3500
"""The same for the driver (616 MiB), the replay queue (209), Ray Train's controller (396) and its helpers (1,020), and
Ray's own processes on the driver's node, with its dashboard. Some pages are shared, so this is an upper bound."""


def process_terms(role: str, gpus: float, weights: int) -> list[Term]:
    """What a process takes in host memory before its model works: libraries, and the weights on their way to a GPU.

    `weights`: bytes of all weights of the model; 0 for a model that goes to its GPUs in parts.
    """
    nbytes = PROCESS_MIB[role] * 2**20
    terms = [Term("Python, torch, Ray", "libraries, of each process", nbytes, estimate=True, on_host=gpus > 0)]
    if gpus > 0 and weights:
        terms.append(Term("weights at the start", "read here, then moved to the GPU", weights, on_host=True))
    return terms


def model_size(folder: str | Path) -> ModelSize:
    """The size of a checkpoint's model, from config.json and the headers of the weight files in its folder.

    Raises:
        OpdlmError: the folder holds no usable checkpoint.
    """
    config = read_config(folder)
    return ModelSize(
        parameters=count_parameters(folder),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_width(config),
        vocabulary=config.vocab_size,
    )


def rollout_memory(config: OpdlmConfig, student: ModelSize, lengths: Lengths) -> RoleMemory:
    """The memory of a rollout actor: see `actors/rollout/kv_cache.py`, and a step in `actors/rollout/denoise.py`."""
    rollout, size = config.rollout, DTYPE_BYTES[config.model.dtype]
    # Requests are dealt to whoever has room, so one actor may have all of them. Recorded forwards have all slots.
    asked = (config.queue.max_staleness + 1) * rollout.samples_per_round
    slots = rollout.batch_size if rollout.cuda_graphs else min(rollout.batch_size, asked)
    # After an evaluation, or with new weights, whatever is unfinished is prefilled again.
    tokens = max(min(slots * lengths.end, PREFILL_TOKENS), lengths.end)
    return RoleMemory(
        "rollout",
        rollout.gpus_per_actor,
        [
            *process_terms("rollout", rollout.gpus_per_actor, student.parameters * size),
            weights_term(student.parameters, config.model.dtype),
            *_arriving_weights(config, student.pushed * size),
            _cache(config, student, slots, lengths),
            *_step(config, slots, student),
            *_clean_path(config, slots, student, lengths),
            _forward(student, tokens, size, f"prefill of {tokens:,} tokens"),
        ],
    )


def _arriving_weights(config: OpdlmConfig, nbytes: int) -> list[Term]:
    """With `nixl`, the actor holds the new weights beside those in use; otherwise the node's object store does."""
    if config.rollout.weight_transport != "nixl":
        return []
    return [Term("weights that arrive", "those that a push moves, once more", nbytes)]


def _cache(config: OpdlmConfig, student: ModelSize, slots: int, lengths: Lengths) -> Term:
    """The one cache of the actor. Without `rollout.cache_tokens` it grows to this if all sequences get longest."""
    bound, evaluation = config.rollout.cache_tokens, config.evaluation
    positions, what = slots * lengths.end, f"at most {slots} slots x {lengths.end:,} positions"
    asked = evaluation.batch_size * lengths.question
    if bound is not None:
        positions, what = bound + SPARE, f"{bound:,} + {SPARE} positions"
    elif asked > positions:
        positions, what = (
            asked,
            f"in evaluations, at most {evaluation.batch_size} slots x {lengths.question:,} positions",
        )
    each, size = student.layers * 2 * student.kv_heads * student.head_dim, DTYPE_BYTES[config.model.dtype]
    heads = f"{student.layers} layers x 2 x {student.kv_heads} heads x {student.head_dim} x {size} B"
    return Term("key/value cache", f"{what} x {heads}", positions * each * size, estimate=bound is None)


def _step(config: OpdlmConfig, slots: int, student: ModelSize) -> list[Term]:
    """Logits of a step; above temperature 0 also probabilities in fp32 and their cumulative sum in fp64
    (`actors/rollout/sampling.py`)."""
    size, vocabulary = config.rollout.block_size, student.vocabulary
    # With drafts: behind each clean token, and of each draft but the first, which the clean path gives.
    rows = 2 * size - 1 if config.rollout.strategy == "verified" else size
    shape = f"{slots} slots x {rows} positions x {vocabulary:,}"
    each = 12 if config.rollout.temperature else 0
    return [
        Term("logits of a step", f"{shape} x 4 B", slots * rows * vocabulary * 4),
        Term("sampling from them", f"{shape} x {each} B", slots * rows * vocabulary * each, estimate=True),
    ]


def _clean_path(config: OpdlmConfig, slots: int, student: ModelSize, lengths: Lengths) -> list[Term]:
    """What `verified` keeps of each slot: hidden states of the clean path, and distributions of sampled drafts."""
    rollout = config.rollout
    if rollout.strategy != "verified":
        return []
    size, drafts = DTYPE_BYTES[config.model.dtype], (rollout.block_size - 1) * student.vocabulary
    hidden = f"{slots} slots x {lengths.end:,} positions x {student.width:,} x {size} B"
    terms = [Term("clean hidden states", hidden, slots * lengths.end * student.width * size)]
    if rollout.temperature:
        what = f"{slots} slots x {rollout.block_size - 1} x {student.vocabulary:,} x 4 B"
        terms.append(Term("distributions of drafts", what, slots * drafts * 4))
    return terms


def teacher_memory(config: OpdlmConfig, teacher: ModelSize, lengths: Lengths) -> RoleMemory:
    """The memory of a teacher actor: see `actors/teacher/scoring.py`. Several GPUs are assumed to hold equal parts."""
    settings = config.teacher
    size, parts = DTYPE_BYTES[settings.dtype], max(1, math.ceil(settings.gpus_per_actor))
    tokens = max(settings.batch_tokens, lengths.end)
    in_parts = settings.backend == "vllm" or settings.device_map == "auto"
    terms = [
        *process_terms("teacher", settings.gpus_per_actor, 0 if in_parts else teacher.parameters * size),
        weights_term(teacher.parameters, settings.dtype, parts, "GPUs"),
    ]
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
    elif settings.targets == "logits":  # those of a whole response, and a copy while its chunks are joined
        response = lengths.end - lengths.prompt
        what = f"{response:,} positions x {teacher.vocabulary:,} x 4 B x 2"
        terms.append(Term("logits of a response", what, response * teacher.vocabulary * 8))
    return RoleMemory("teacher", settings.gpus_per_actor, terms)


def reward_memory() -> RoleMemory:
    """The memory of a reward actor. What a function of the user's own takes is not known."""
    return RoleMemory("reward", 0, process_terms("reward", 0, 0))


def reference_memory(config: OpdlmConfig, student: ModelSize, lengths: Lengths) -> RoleMemory:
    """The memory of an actor with the frozen reference: see `deploy/run/reference.py`."""
    size, gpus, tokens = DTYPE_BYTES[config.model.dtype], config.rollout.gpus_per_actor, 16 * lengths.row
    return RoleMemory(
        "reference",
        gpus,
        [
            *process_terms("reference", gpus, student.parameters * size),
            weights_term(student.parameters, config.model.dtype),
            _forward(student, tokens, size, f"forward of 16 rows, {tokens:,} tokens"),
        ],
    )


def weights_term(parameters: int, dtype: str, parts: int = 1, split_over: str = "") -> Term:
    """The weights of a model in one process. `parts`: the number of ranks or GPUs (`split_over`) that share them."""
    size = DTYPE_BYTES[dtype]
    split = f" / {parts} {split_over}" if parts > 1 else ""
    return Term("weights", f"{parameters:,}{split} x {size} B ({dtype})", -(-parameters // parts) * size)


def _forward(size: ModelSize, tokens: int, item: int, what: str) -> Term:
    """The peak of a forward without gradient: residual, normed input, gate, up and the product of both."""
    values = 2 * size.width + 3 * size.intermediate
    return Term("activations", f"{what} x {values:,} x {item} B", tokens * values * item, estimate=True)


def to_plain(memory: RoleMemory) -> dict[str, Any]:
    """The memory of a role for JSON, in bytes."""
    return {
        "role": memory.role,
        "gpus": memory.gpus,
        "device_bytes": memory.device_bytes,
        "host_bytes": memory.host_bytes,
        "terms": [asdict(term) for term in memory.terms],
    }
