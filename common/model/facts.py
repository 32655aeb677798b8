"""What a checkpoint folder says without loading weights: vocabulary, context, special tokens, block layout, size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json
from opdlm.common.grid import GridKind
from opdlm.common.model.config import OUTPUT, read_config
from opdlm.common.model.shards import read_shards
from opdlm.common.model.tokenizer import load_tokenizer


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
