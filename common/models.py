"""Loading and saving causal LMs of transformers as teacher or student, and the two calls everything else makes.

A student is the same network as its teacher with another mask and no logit shift, so its weights and its modules are
transformers' own. What makes it a student is in its config.json: `mask_token_id`, and where known `block_size`,
`block_grid`. The public OPDLM checkpoints (`model_type: a2d-qwen3`) and SDAR's are Qwen3 weights under other names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common.errors import OpdlmError
from common.files import read_json
from common.grid import GridKind
from common.shards import read_shards

A2D_PREFIX = "a2d-"
_NOT_FROM_A_FILE = (
    "auto_map",  # names code beside the weights
    "attn_implementation",  # may name a kernel on the hub, which is code too
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",  # would be loaded instead of the files that were checked
)
"""Keys of config.json that would choose code or files; a checkpoint has no say in these."""
SUPPORTED_TYPES = ("qwen3", "qwen2", "llama")
"""Families whose forward takes our 4-D masks and whose logits are `lm_head(hidden)` and nothing more."""
SDAR_TYPE = "sdar"  # Qwen3's network, diffusion checkpoints only

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""The two matrices with a row per token, by their names in all three families; a tied model has the first."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint folder says without loading weights."""

    folder: Path
    vocab_size: int
    """Rows of the output matrix."""
    context: int
    """`max_position_embeddings`, in tokens."""
    eos_ids: tuple[int, ...]
    mask_id: int | None
    """None for an autoregressive model that has none."""
    block_size: int | None
    block_grid: GridKind | None
    is_student: bool


def read_config(folder: str | Path) -> Any:
    """The transformers config of a checkpoint folder; `a2d-qwen3` and `sdar` are read as the Qwen3 that they are.

    Raises:
        OpdlmError: no such folder, no config.json, an adapter's folder, a family that is not supported, or a setting
            of it under which decoding with a cache and the training forward could not agree.
    """
    path = Path(folder)
    file = path / "config.json"
    if not path.is_dir():
        raise OpdlmError(f"model folder {path} does not exist; expected a checkpoint in Hugging Face layout")
    if not file.is_file():
        raise OpdlmError(f"model folder {path} has no config.json; expected a checkpoint in Hugging Face layout")
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names instead
        raise OpdlmError(f"model folder {path} holds an adapter (adapter_config.json); expected a merged model")
    raw = read_json(file)
    named = str(raw.get("model_type", ""))
    family = "qwen3" if named == SDAR_TYPE else named.removeprefix(A2D_PREFIX)
    if family not in SUPPORTED_TYPES:
        raise OpdlmError(
            f"{file}: model_type is {raw.get('model_type')!r}; supported: "
            + ", ".join([*(f"{t}, {A2D_PREFIX}{t}" for t in SUPPORTED_TYPES), SDAR_TYPE])
        )
    settings = {key: value for key, value in raw.items() if key not in ("model_type", *_NOT_FROM_A_FILE)}
    config = AutoConfig.for_model(family, **settings)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise OpdlmError(f"{file}: use_sliding_window is on; a sliding window has no block-causal counterpart here")
    rope = config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise OpdlmError(
            f"{file}: rope_type is {rope!r}, whose rotation changes with the sequence's length, so that keys in a "
            "cache grow wrong; expected one that depends on the position alone (default, linear, yarn, llama3)"
        )
    config.is_diffusion_student = raw["model_type"] != family or raw.get("mask_token_id") is not None
    return config


def read_facts(folder: str | Path) -> ModelFacts:
    """Vocabulary, context, special tokens and block layout of a checkpoint folder (config and tokenizer only)."""
    config = read_config(folder)
    return ModelFacts(
        folder=Path(folder),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        eos_ids=_eos_ids(Path(folder), config),
        mask_id=_mask_id(Path(folder), config),
        block_size=getattr(config, "block_size", None),
        block_grid=getattr(config, "block_grid", None),
        is_student=config.is_diffusion_student,
    )


def load_model(
    folder: str | Path, dtype: str = "float32", attention: str = "sdpa", device_map: str | None = None
) -> Any:
    """Loads weights (safetensors only) for either role.

    Args:
        folder: Hugging Face layout.
        dtype: number format of the weights in memory; `auto` keeps the stored one.
        attention: `sdpa` (dense boolean or causal masks) or `flex_attention` (block masks, GPU).
        device_map: `auto` spreads the layers over the devices of this process (needs accelerate).

    Returns: a causal LM of transformers, in eval mode, on the CPU unless `device_map` says otherwise.
    """
    config = read_config(folder)
    read_shards(folder)  # pickles, missing and damaged files are named here
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            device_map=device_map,
            trust_remote_code=False,
        )
    except OSError as error:
        raise OpdlmError(f"model folder {folder}: {' '.join(str(error).split())}") from None
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        OpdlmError: there is none, it cannot be read without running code, or it lacks an end-of-sequence token.
    """
    if not has_tokenizer(folder):
        raise OpdlmError(f"model folder {folder} has no tokenizer.json; text needs a tokenizer beside the weights")
    # Given our reading of the config, transformers neither looks for code in the folder nor asks whether to run it.
    config = read_config(folder) if (Path(folder) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # whatever its files can do wrong; the tokenizers library raises Exception itself
        reason = " ".join(str(error).split())
        raise OpdlmError(f"the tokenizer in {folder} cannot be read: {reason or type(error).__name__}") from error
    if tokenizer.eos_token_id is None:
        raise OpdlmError(f"the tokenizer in {folder} has no end-of-sequence token (eos_token); responses could not end")
    return tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder has a tokenizer beside its weights."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def hidden_states(
    model: Any,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    mask: Any = None,
    cache: Any = None,
    **others: Any,
) -> torch.Tensor:
    """Final hidden states, before the output matrix.

    Args:
        input_ids: `[B, T]` int64; None with `inputs_embeds`.
        position_ids: `[B, T]` int64; None counts from 0.
        mask: `[B, 1, T, T']`, bool (True = attended) or added to the scores, or a flex BlockMask; None is causal.
        cache: object with `update(keys, values, layer)`.
        others: `inputs_embeds` `[B, T, D]` in place of ids; what else the attention function takes.

    Returns: `[B, T, D]` in the model's dtype.
    """
    output = model.model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=False,
        **others,
    )
    return output.last_hidden_state


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: at its embedding, which `device_map` may put apart from other layers."""
    return model.get_input_embeddings().weight.device


def check_vocabularies(teacher: ModelFacts, student: ModelFacts) -> None:
    """Teacher and student must mean the same token by the same id.

    The student may have one row more, if that is its mask token (added on conversion); the losses then leave that
    row out of the student's softmax, as sampling does.
    """
    extra = student.vocab_size - teacher.vocab_size
    if extra != 0 and not (extra == 1 and student.mask_id == teacher.vocab_size):
        raise OpdlmError(
            f"vocabulary mismatch: the teacher {teacher.folder} has {teacher.vocab_size} tokens, the student "
            f"{student.folder} {student.vocab_size}; they must agree (or differ by the student's added mask token)"
        )


def require_mask(facts: ModelFacts) -> int:
    """The student's mask token id, or a clear error where there is none."""
    if facts.mask_id is None:
        raise OpdlmError(f"{facts.folder} has no mask token; convert it first: opdlm convert {facts.folder} DST")
    return facts.mask_id


def _eos_ids(folder: Path, config: Any) -> tuple[int, ...]:
    found: list[int | Sequence[int] | None] = [config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_dict(read_json(folder / "generation_config.json")).eos_token_id)
    ids = {i for item in found if item is not None for i in ([item] if isinstance(item, int) else item)}
    if not ids and (folder / "tokenizer_config.json").is_file():
        ids = {load_tokenizer(folder).eos_token_id}
    if not ids:
        raise OpdlmError(f"{folder}/config.json names no end-of-sequence token (eos_token_id); responses could not end")
    return tuple(sorted(ids))


def _mask_id(folder: Path, config: Any) -> int | None:
    if getattr(config, "mask_token_id", None) is not None:
        return int(config.mask_token_id)
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(folder).mask_token_id
    return None


def count_parameters(folder: str | Path) -> int:
    """Parameters of a checkpoint folder, from the headers of its weight files."""
    shards = read_shards(folder)
    tied = read_config(folder).tie_word_embeddings  # the output matrix is then no parameter, even where it is stored
    return sum(math.prod(shards.shape(name)) for name in shards.file_of if not (tied and name == OUTPUT))


def load_output_matrix(folder: str | Path, dtype: str) -> torch.Tensor:
    """The output matrix `[V, D]` alone, without loading the model; the embedding where the two are tied."""
    name = EMBEDDING if read_config(folder).tie_word_embeddings else OUTPUT
    return read_shards(folder).load(name).to(getattr(torch, dtype))
