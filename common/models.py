"""Loading and saving causal LMs of transformers as teacher or student, and the two calls everything else makes.

A student is the same network as its teacher with another mask and no logit shift, so its weights and its modules are
transformers' own. What makes it a student is in its config.json: `mask_token_id`, and where known `block_size`,
`block_grid`. The public OPDLM checkpoints (`model_type: a2d-qwen3`) are Qwen3 weights under another name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common.errors import OpdlmError
from common.grid import GridKind

A2D_PREFIX = "a2d-"
SUPPORTED_TYPES = ("qwen3",)
"""Families whose forward takes our 4-D masks and whose logits are `lm_head(hidden)` and nothing more."""


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
    """The transformers config of a checkpoint folder; `a2d-qwen3` is read as the Qwen3 that it is.

    Raises:
        OpdlmError: no such folder, no config.json, or a family that is not supported.
    """
    path = Path(folder)
    file = path / "config.json"
    if not path.is_dir():
        raise OpdlmError(f"model folder {path} does not exist; expected a checkpoint in Hugging Face layout")
    if not file.is_file():
        raise OpdlmError(f"model folder {path} has no config.json; expected a checkpoint in Hugging Face layout")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise OpdlmError(f"{file} is not JSON: {error}") from None
    family = str(raw.get("model_type", "")).removeprefix(A2D_PREFIX)
    if family not in SUPPORTED_TYPES:
        raise OpdlmError(
            f"{file}: model_type is {raw.get('model_type')!r}; supported: "
            + ", ".join(f"{t}, {A2D_PREFIX}{t}" for t in SUPPORTED_TYPES)
        )
    if raw.get("use_sliding_window"):
        raise OpdlmError(f"{file}: use_sliding_window is on; a sliding window has no block-causal counterpart here")
    raw.pop("auto_map", None)  # names code that we neither need nor run
    config = AutoConfig.for_model(family, **{k: v for k, v in raw.items() if k != "model_type"})
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


def load_model(folder: str | Path, dtype: str = "float32", attention: str = "sdpa") -> Any:
    """Loads weights (safetensors only) for either role.

    Args:
        folder: Hugging Face layout.
        dtype: number format of the weights in memory; `auto` keeps the stored one.
        attention: `sdpa` (dense boolean or causal masks) or `flex_attention` (block masks, GPU).

    Returns: a causal LM of transformers, in eval mode, on the CPU.
    """
    config = read_config(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    except OSError as error:
        raise OpdlmError(f"model folder {folder}: {' '.join(str(error).split())}") from None
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        OpdlmError: there is none, or it lacks an end-of-sequence token.
    """
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise OpdlmError(f"model folder {folder} has no tokenizer.json; text needs a tokenizer beside the weights")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise OpdlmError(f"the tokenizer in {folder} has no end-of-sequence token (eos_token); responses could not end")
    return tokenizer


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    mask: Any = None,
    cache: Any = None,
) -> torch.Tensor:
    """Final hidden states, before the output matrix.

    Args:
        input_ids: `[B, T]` int64.
        position_ids: `[B, T]` int64; None counts from 0.
        mask: `[B, 1, T, T']` bool (True = attended) or a flex BlockMask; None is causal.
        cache: object with `update(keys, values, layer)`.

    Returns: `[B, T, D]` in the model's dtype.
    """
    output = model.model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=False
    )
    return output.last_hidden_state


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
        found.append(GenerationConfig.from_pretrained(folder).eos_token_id)
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
    total = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def load_output_matrix(folder: str | Path, dtype: str) -> torch.Tensor:
    """The output matrix `[V, D]` alone, without loading the model; the embedding where the two are tied."""
    name = "model.embed_tokens.weight" if read_config(folder).tie_word_embeddings else "lm_head.weight"
    index = Path(folder) / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(Path(folder) / file, "pt") as tensors:
        return tensors.get_tensor(name).to(getattr(torch, dtype))
